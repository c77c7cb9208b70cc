"""`sivae-dist diff` on real runs that differ in one thing each, and what a run writes into fingerprints.jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sivae_dist.apps import diff as app
from sivae_dist.cli import main
from sivae_dist.data.toy2d import Toy2dStream
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.engine.config import from_dict
from sivae_dist.engine.fingerprints import Fingerprints
from sivae_dist.engine.iteration import Iteration
from sivae_dist.engine.run import train

SETTINGS: dict[str, Any] = {
    "model": {"name": "mlp", "width": 8, "hidden_layers": 1},
    "data": {"name": "toy2d"},
    "train": {"kimg": 0.2, "batch": 50},
    "checkpoint": {"every_kimg": 0.1, "best": None, "background": False},
    "tracking": {"every_kimg": 0.1, "images_every_kimg": 0, "progress": False, "tensorboard": False},
    "eval": {"every_kimg": 0, "at_start": False},
}


def made(out: Path, **changes: dict[str, Any]) -> Path:
    """A run of 4 iterations with some settings of some sections changed."""
    values = {name: {**SETTINGS.get(name, {}), **changes.get(name, {})} for name in {**SETTINGS, **changes}}
    return train(from_dict(values, "test"), out)


def rows(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "fingerprints.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "took_s"} for row in found]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("diff") / "plain")


def status(*arguments: object) -> int:
    try:
        main(["diff", *map(str, arguments)])
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_what_is_written(plain: Path) -> None:
    assert [row["nimg"] for row in rows(plain)] == [0, 50, 100, 200]  # at the start, iterations 1, 2, 4
    assert set(rows(plain)[0]) == {"nimg", "weights"}
    row = rows(plain)[-1]
    assert list(row["gradients"]) == ["encoder/encoder", "decoder/decoder"]
    assert set(row["optimizer"]) == set(row["weights"]) == set(row["average"]) == {"encoder", "decoder"}
    assert all(len(x[0]) == 16 and x[1] > 0 for x in (row["noise"], row["data"]["x"], *row["weights"].values()))
    metrics = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    pair = [r["losses"]["encoder/rec"] for r in rows(plain) if r["nimg"] in (50, 100)]
    assert sum(pair) / 2 == pytest.approx(metrics[0]["rec/real"], rel=1e-6)


def test_the_same_again(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the run was split in two, which leaves the rows of the first life that were taken back."""
    again = made(tmp_path / "again", train={"kimg": 0.1}, tracking={"images": 3})
    with open(again / "fingerprints.jsonl", "a") as file:
        file.write(json.dumps({"nimg": 150, "weights": {}}) + "\n" + '{"nimg": 2')
    made(again, tracking={"images": 3})
    assert rows(again) == rows(plain)
    assert status(plain, again) == 0
    said = capsys.readouterr().out
    assert "same: every bit of 4 fingerprints up to 200 images" in said
    assert "changes nothing in the training:\n  tracking.images" in said


def another_noise(patch: pytest.MonkeyPatch) -> None:
    build = Iteration.__init__
    patch.setattr(Iteration, "__init__", lambda self, *a, **k: build(self, *a, **{**k, "seed": 1}))


def other_positions(patch: pytest.MonkeyPatch) -> None:
    batches = Toy2dStream.batches
    patch.setattr(Toy2dStream, "batches", lambda self, start, size: batches(self, start + 7, size))


def a_lost_gradient(patch: pytest.MonkeyPatch) -> None:
    def hook(self: Any, phase: Any, terms: Any) -> None:
        next(self.strategy.players[phase.trains[0]].parameters()).grad.mul_(1.001)
        observe(self, phase, terms)

    from sivae_dist.engine import fingerprints

    observe = fingerprints.Look.observe
    patch.setattr(fingerprints.Look, "observe", hook)


# What differs -> settings, what else is done, and where that shows first.
CASES: dict[str, tuple[dict[str, Any], Callable[[pytest.MonkeyPatch], None] | None, int, str]] = {
    "seed": ({"train": {"seed": 1}}, None, 0, "weights: encoder"),
    "positions": ({}, other_positions, 50, "data: positions"),
    "data": ({"data": {"density": "rings"}}, None, 50, "data: values"),
    "noise": ({}, another_noise, 50, "noise: draws"),
    "objective": ({"objective": {"beta_neg": 3.0}}, None, 50, "loss: encoder/exp_elbo_rec"),
    "gradient": ({}, a_lost_gradient, 50, "gradient: encoder/encoder"),
    "step": ({"optim": {"encoder": {"lr": 3e-4}}}, None, 50, "weights: encoder"),
    "average": ({"ema": {"rampup": 0.0}}, None, 50, "average: encoder"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_differs_first_is_named(
    case: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, break_it, nimg, first = CASES[case]
    if break_it is not None:
        break_it(monkeypatch)
    other = made(tmp_path / "other", **{**changes, "train": {"kimg": 0.1, **changes.get("train", {})}})
    exact = ("--tolerance", 1e-12)  # so early weights have hardly moved
    assert status(plain, other, "--json", *exact) == 1
    told = json.loads(capsys.readouterr().out)
    place = told["first_difference"]
    assert (place["nimg"], place["things"][0]["name"]) == (nimg, first)
    assert told["verdict"] == "different"
    matters = [fact["name"] for fact in told["facts"] if fact["matter"] == "matters" and fact["name"] != "data"]
    assert len(matters) == (1 if break_it is None else 0)
    assert status(plain, other, *exact) == 1
    said = capsys.readouterr().out
    assert f"what it begins with: {first}; " in said
    assert said.splitlines()[-1].startswith("different from ")


def test_rounding_is_told_from_difference(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Micro-batches add up in another order, with the same samples and noise."""
    other = made(tmp_path / "other", train={"accumulation": 3})
    assert status(plain, other) == 1
    said = capsys.readouterr().out
    assert "differ in rounding from 50 images, beginning with loss: encoder/" in said.splitlines()[-1]
    assert "different, " not in said
    assert status(plain, other, "--tolerance", 0) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("different from 50 images")


def test_gradients_in_flat_shards_are_compared_by_norm(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Replicated, "gradients_by_parameter", False)
    alike = made(tmp_path / "alike")
    told = [json.loads(line) for line in (alike / "fingerprints.jsonl").read_text().splitlines()]
    pairs = [pair for row in told for pair in row.get("gradients", {}).values()]
    assert pairs
    assert all(pair[0] is None and pair[1] > 0 for pair in pairs)
    status(plain, alike)
    assert "different" not in capsys.readouterr().out
    a_lost_gradient(monkeypatch)
    assert status(plain, made(tmp_path / "other")) == 1
    assert "what it begins with: gradient: encoder/encoder; " in capsys.readouterr().out


def test_a_gap_before_the_difference_is_told(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Iteration 3 has no row, so at 4 the cause cannot be told from what follows."""
    late = made(tmp_path / "late", train={"kimg": 0.15})
    made(late, optim={"encoder": {"lr": 3e-4}})
    assert [row["nimg"] for row in rows(late)] == [0, 50, 100, 200]
    assert status(plain, late) == 1
    said = capsys.readouterr().out
    assert "the same bit for bit up to 100 images" in said
    assert "what it begins with: weights: encoder" in said or "iterations without a fingerprint" in said


def test_when_rows_are_due() -> None:
    prints = Fingerprints.__new__(Fingerprints)
    prints.every_kimg = 1.0
    assert [n for n in range(100, 3000, 100) if prints.due(n, 100)] == [100, 200, 400, 800, 1000, 1600, 2000]
    prints.every_kimg = 0
    assert not any(prints.due(n, 100) for n in range(100, 3000, 100))


def test_none_are_written_where_they_are_switched_off(plain: Path, tmp_path: Path) -> None:
    off = made(tmp_path / "off", train={"kimg": 0.1}, tracking={"fingerprints_every_kimg": 0})
    assert not (off / "fingerprints.jsonl").exists()
    assert status(plain, off) == 2


def test_what_is_refused(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(plain, plain) == status(plain, tmp_path) == status(plain, tmp_path, "--tolerance", 2) == 2
    said = capsys.readouterr().err
    assert "is given twice" in said and "is no run folder" in said and "--tolerance" in said
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.yaml").write_text((plain / "config.yaml").read_text())
    for row in ('{"nimg": "x"}', '{"nimg": 50, "weights": 3}', '{"nimg": 50, "data": 1, "noise": [[], 2]}', "[1]", ""):
        (damaged / "fingerprints.jsonl").write_text(row + "\n")
        assert status(plain, damaged) in {1, 2}
    (damaged / "manifest.json").write_text("[]")
    assert status(plain, damaged) == 2


def test_a_run_is_not_changed_by_being_looked_at(plain: Path, tmp_path: Path) -> None:
    off = made(tmp_path / "off", tracking={"fingerprints_every_kimg": 0})
    for name in ("weights", "ema", "optimizer"):
        one, two = (run / f"checkpoints/nimg-000000200/{name}.safetensors" for run in (plain, off))
        assert one.read_bytes() == two.read_bytes()


def test_nothing_is_far_from_nan() -> None:
    assert app._apart(float("nan"), float("nan")) == 0
    assert app._apart(1.0, float("nan")) == torch.inf

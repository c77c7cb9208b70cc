"""Spoilt numbers on one rank: skipped by all ranks together, rolled back when they stay, given up with advice."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import accelerate_launch
from running import ROOT, environment, final_files, results

import sivae_dist
from sivae_dist.engine.config import from_dict, merge, read_yaml
from sivae_dist.engine.iteration import Iteration

DRIVER = str(Path(__file__).with_name("poisons.py"))
# Batches of 10; checkpoints after 60, 120, 180, ... images, so that the burst goes back to 180.
POISONS = [
    {"what": "data", "rank": 1, "at": [100, 110]},
    {"what": "gradient of the decoder", "rank": 1, "at": [150, 160]},
    {"what": "gradient of the encoder", "rank": 0, "at": [200, 300], "salts": [0]},
]


@pytest.fixture(scope="module")
def spoilt(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two ranks; one spoilt at 100 and at 150 images, then a burst that ends when the salt changes."""
    folder = tmp_path_factory.mktemp("spoilt")
    options = ["--config", str(config), "--out", str(folder / "run"), "--guard.patience", "3"]
    env = {"POISONS": json.dumps(POISONS), "RECORD": str(folder / "record")}
    done = accelerate_launch(2, DRIVER, *options, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [[json.loads(x) for x in (folder / f"record-{r}.jsonl").read_text().splitlines()] for r in (0, 1)]
    return {"run": folder / "run", "said": done.stderr, "records": records}


def at(records: list[dict[str, Any]], nimg: int) -> dict[str, Any]:
    return next(row for row in records if row["nimg"] == nimg)


@pytest.mark.dist
def test_both_ranks_skip_and_name_the_culprit(spoilt: dict[str, Any]) -> None:
    lines = [line for line in spoilt["said"].splitlines() if "not finite at" in line]
    assert lines[0].startswith("not finite at 110 images, phase encoder skipped on all ranks (rank 0: encoder/rec")
    assert "; rank 1: data, encoder/rec, encoder/kl_real, " in lines[0]
    assert lines[1] == (
        "not finite at 160 images, phase decoder skipped on all ranks (rank 1: gradient of the decoder)"
    )
    assert lines[2] == (
        "not finite at 210 images, phase encoder skipped on all ranks (rank 0: gradient of the encoder)"
    )
    assert len(lines) == 5


@pytest.mark.dist
def test_a_skip_leaves_no_trace_and_ranks_stay_equal(spoilt: dict[str, Any]) -> None:
    rank0, rank1 = spoilt["records"]
    assert [(r["nimg"], r["salt"], r["after"]) for r in rank0] == [(r["nimg"], r["salt"], r["after"]) for r in rank1]
    for rows in spoilt["records"]:
        for nimg in (100, 200, 210, 220):
            assert at(rows, nimg)["before"] == at(rows, nimg)["after"]
        clean, half = at(rows, 140), at(rows, 150)
        assert not clean["before"].items() & clean["after"].items()
        # The encoder phase stands, with the statistics of both networks that it moved.
        assert half["before"]["weights of the encoder"] != half["after"]["weights of the encoder"]
        assert half["before"]["weights of the decoder"] == half["after"]["weights of the decoder"]


@pytest.mark.dist
def test_a_burst_is_rolled_back_with_another_salt(spoilt: dict[str, Any]) -> None:
    assert "back to nimg-000000180, with other data order and noise (rollback 1)" in spoilt["said"]
    rank0 = spoilt["records"][0]
    assert [r["nimg"] for r in rank0] == [*range(0, 230, 10), *range(180, 400, 10)]
    first, second = (r for r in rank0 if r["nimg"] == 180)
    assert first["before"] == second["before"]  # exactly the checkpoint's state
    assert (first["salt"], second["salt"]) == (0, 1)
    assert first["x"] != second["x"]
    run = spoilt["run"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    reports = [row for row in rows if "guard/skipped" in row]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert [row["nimg"] for row in reports] == sorted({row["nimg"] for row in reports})
    last = reports[-1]
    assert last["nimg"] == 400
    assert (last["guard/skipped"], last["guard/rollbacks"], last["guard/overflows"]) == (5, 1, 0)
    state = json.loads((run / "checkpoints/nimg-000000400/state.json").read_text())
    assert state["plan_salt"] == 1
    assert state["guard"]["in_a_row"] == 0


@pytest.mark.dist
def test_permanent_trouble_ends_with_advice(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--config", str(config), "--out", str(run), "--guard.patience", "2", "--guard.max_rollbacks", "2"]
    poisons = [{"what": "data", "rank": 0, "at": [140, 1000]}]
    command = [sys.executable, DRIVER, *options]
    env = environment({"POISONS": json.dumps(poisons)})
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "error: 2 iterations in a row were not finite, the last at 160 images" in done.stderr
    assert "rolled back 2 times already" in done.stderr
    assert "fix: lower the learning rate" in done.stderr
    assert "(rollback 2)" in done.stderr
    assert (run / "checkpoints/latest").read_text().strip() == "nimg-000000120"
    model = sivae_dist.load(run)  # which checks sizes and hashes
    assert bool(model.sample(2).isfinite().all())


def train_here(config: Path, out: Path, resume: str = "auto", **sections: Any) -> Path:
    """In this process, which saves the imports."""
    values = merge(read_yaml(config), sections)
    return sivae_dist.train(from_dict(values, "test"), out, resume)


def spoil(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """Turns the data to NaN from image `first` to `last`, as long as the salt is 0."""
    call = Iteration.__call__

    def spoilt_call(self: Iteration, batch: Any, *, nimg: int, **options: Any) -> Any:
        if first <= nimg < last and self.salt == 0:
            batch.x.fill_(math.nan)
        return call(self, batch, nimg=nimg, **options)

    monkeypatch.setattr(Iteration, "__call__", spoilt_call)


def test_without_a_checkpoint_back_to_the_beginning(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 60, 100)
    late: dict[str, Any] = {"train": {"kimg": 0.2}, "checkpoint": {"every_kimg": 1}}
    spoilt = train_here(config, tmp_path / "spoilt", guard={"patience": 3}, **late)
    monkeypatch.undo()
    assert results(spoilt)[0]["nimg"] == 0
    assert next(row for row in reversed(results(spoilt)) if "guard/skipped" in row)["guard/rollbacks"] == 1
    assert [row["nimg"] for row in results(spoilt) if "lr/encoder" in row] == [50, 100, 150, 200]
    # The same as a run that had the other salt from the start.
    monkeypatch.setattr("sivae_dist.engine.trainer.Trainer._open_stream", salted_stream(1))
    clean = train_here(config, tmp_path / "clean", **late)
    assert final_files(spoilt) == final_files(clean)


def salted_stream(salt: int) -> Any:
    from sivae_dist.engine.trainer import Trainer

    original = Trainer._open_stream

    def open_stream(self: Any) -> Any:
        self.salt = salt
        return original(self)

    return open_stream


def test_killed_after_a_rollback_it_goes_on_exactly(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, 80, 200)
    whole = train_here(
        config, tmp_path / "whole", guard={"patience": 3}, train={"kimg": 0.3}, checkpoint={"keep_last": 9}
    )
    assert "back to nimg-000000060" in capsys.readouterr().err
    monkeypatch.undo()  # what comes after the rollback needs no spoiling: the salt has changed
    for nimg in (120, 240):
        branch = tmp_path / f"branch-{nimg}"
        start = whole / f"checkpoints/nimg-{nimg:09d}"
        train_here(config, branch, str(start), guard={"patience": 3}, train={"kimg": 0.3})
        assert final_files(branch) == final_files(whole)
        tail = [row for row in results(whole) if row["nimg"] > nimg]
        assert results(branch) == tail
        assert next(row for row in reversed(tail) if "guard/skipped" in row)["guard/rollbacks"] == 1


def test_fp16_scales_the_loss_and_resumes_exactly(config: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "precision": {"dtype": "fp16", "loss_scale": 2.0**24, "loss_scale_steps": 4},
        "train": {"kimg": 0.3},
        "checkpoint": {"keep_last": 9},
    }
    whole = train_here(config, tmp_path / "whole", **sections)
    last = [row for row in results(whole) if "guard/overflows" in row][-1]
    assert last["guard/overflows"] > 2
    assert last["guard/nonfinite"] == last["guard/skipped"] == 0
    scales = json.loads((whole / "checkpoints/nimg-000000300/state.json").read_text())["loss_scales"]["scale"]
    assert set(scales) == {"encoder", "decoder"}
    branch = train_here(config, tmp_path / "branch", str(whole / "checkpoints/nimg-000000120"), **sections)
    assert final_files(branch) == final_files(whole)

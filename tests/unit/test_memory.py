"""Predicted memory against what torch's own allocator tells of the same training step, and the command."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sivae_dist.apps import memory_table
from sivae_dist.apps.memory_table import Wish
from sivae_dist.cli import main
from sivae_dist.data.base import SLICE_BYTES
from sivae_dist.engine.config import RunConfig, from_dict, read_yaml
from sivae_dist.engine.predict_memory import Case, follow, predict
from sivae_dist.engine.storages import Storages
from sivae_dist.errors import UserError
from sivae_dist.models import ModelConfig
from sivae_dist.models.residual import ResidualConfig
from sivae_dist.models.style import StyleConfig
from sivae_dist.registry import components

ROOT = Path(__file__).resolve().parents[2]
MODELS = components("sivae_dist.models", ModelConfig)
TOLERANCE = 0.1
MIB = 1 << 20
CONVOLUTIONS = {"aten::convolution", "aten::convolution_backward"}


def quick_or_slow(names: Iterable[str], quick: set[str]) -> list[Any]:
    """All names, those that are not quick as slow tests."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def run_config(name: str, **sections: Any) -> RunConfig:
    import dataclasses

    model = dataclasses.asdict(MODELS[name].tiny())  # type: ignore[attr-defined]
    return from_dict({"model": model, **sections}, "test")


def allocated(action: Any) -> int:
    """Peak bytes that torch's CPU allocator hands out meanwhile, by its own log.

    What operations use inside and free before they return is in it, except that of convolutions, whose workspaces the
    prediction leaves out (some have none: oneDNN takes its own elsewhere; others unfold whole maps).
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        action()
    events = sorted(log.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    now = peak = 0
    inside = 0  # end of the convolution that is running
    for event in events:
        if event.name() in CONVOLUTIONS:
            inside = max(inside, event.start_ns() + event.duration_ns())
        if event.start_ns() > inside:
            peak = max(peak, now)
        if event.name() == "[memory]":
            now += event.nbytes()
            if event.start_ns() > inside:
                peak = max(peak, now)
    return peak


@pytest.mark.parametrize("dtype, recompute_from", [("fp32", None), ("bf16", 0)])
@pytest.mark.parametrize("name", quick_or_slow(MODELS, quick={"mlp", "residual"}))
def test_prediction_is_what_a_training_step_allocates(name: str, dtype: Any, recompute_from: int | None) -> None:
    case = Case(run_config(name, train={"recompute_from": recompute_from}), 8, dtype)
    predicted = predict(case).total
    assert allocated(lambda: follow(case, iterations=2)) == pytest.approx(predicted, rel=TOLERANCE)


@pytest.mark.parametrize("train", [{}, {"recompute_from": 0}, {"accumulation": 4}], ids=str)
@pytest.mark.parametrize("name", quick_or_slow(["residual", "modulated"], quick={"residual"}))
def test_prediction_where_phases_share_what_was_decoded(name: str, train: dict[str, Any]) -> None:
    """Every micro-batch keeps its images and their graph until its decoder phase: more than without."""
    told = {
        once: predict(Case(run_config(name, train=train | {"decode_once": once}), 8, "fp32")) for once in (False, True)
    }
    case = Case(run_config(name, train=train | {"decode_once": True}), 8, "fp32")
    assert allocated(lambda: follow(case, iterations=2)) == pytest.approx(told[True].total, rel=TOLERANCE)
    assert told[True].phases["encoder"] > told[False].phases["encoder"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "style"])
def test_prediction_with_micro_batches_on_two_processes(name: str) -> None:
    """Synchronised batch norm and buckets of gradients are those of two; six images in three passes."""
    case = Case(run_config(name, train={"accumulation": 3}), 6, "fp32", processes=2)
    assert allocated(lambda: follow(case, iterations=2)) == pytest.approx(predict(case).total, rel=TOLERANCE)


def test_an_image_cannot_be_split() -> None:
    once, often = (Case(run_config("mlp", train={"accumulation": n}), 1, "fp32") for n in (1, 8))
    assert predict(often) == predict(once)


@pytest.mark.slow
def test_prediction_of_a_level() -> None:
    case = Case(run_config("style"), 8, "fp32", level=1)
    told = predict(case)
    assert told.resolution == 8 and told.total < predict(Case(case.config, 8, "fp32")).total
    assert allocated(lambda: follow(case, iterations=2)) == pytest.approx(told.total, rel=TOLERANCE)


def coarse(accumulation: int) -> Case:
    """A large batch of pictures that are large until they are averaged down."""
    model = {"name": "style", "image_size": 256, "startf": 1, "maxf": 4, "latent_size": 4, "mapping_layers": 2}
    return Case(from_dict({"model": model, "train": {"accumulation": accumulation}}, "test"), 192, "fp32", level=0)


def test_data_of_a_coarse_level() -> None:
    """Mostly their bytes, never their numbers."""
    told = predict(coarse(1))
    assert told.resolution == 4 and told.data == 192 * 3 * 256 * 256
    assert told.phases["images"] < SLICE_BYTES + MIB < 4 * told.data
    assert told.total >= told.data + told.phases["images"] > told.data + SLICE_BYTES - MIB


@pytest.mark.slow
def test_prediction_of_a_coarse_level() -> None:
    told = predict(coarse(1))
    assert allocated(lambda: follow(coarse(1))) == pytest.approx(told.total, rel=TOLERANCE)
    assert predict(coarse(4)).data == told.data


def test_predicting_allocates_nothing() -> None:
    """The network at 1024 pixels takes gigabytes."""
    recipe = ROOT / "configs/celebahq1024_residual.yaml"
    case = Case(from_dict(read_yaml(recipe), "test"), 2, "fp32")
    told: list[int] = []
    assert allocated(lambda: told.append(predict(case).total)) < 8 * MIB
    assert told[0] > 1 << 30


def test_parts_and_sum() -> None:
    config = run_config("residual")
    told = predict(Case(config, 4, "fp32"))
    parameters = sum(p.numel() for p in config.model.build().parameters()) * 4
    assert told.gradients == parameters
    assert parameters < told.weights == told.average < 1.1 * parameters
    assert 2 * parameters < told.optimizer < 2.01 * parameters + 100 * 4 * 2
    assert told.phases.keys() == {"images", "encoder", "decoder", "steps"}
    assert told.data == 4 * 3 * config.model.image_size**2  # type: ignore[attr-defined]
    held = told.weights + told.gradients + told.optimizer + told.average + told.data
    assert told.total == held + told.activations
    twice = predict(Case(config, 8, "fp32"))
    assert twice.activations == pytest.approx(2 * told.activations, rel=0.1)
    again = predict(Case(run_config("residual", train={"recompute_from": 0}), 8, "fp32"))
    assert again.activations < 0.6 * twice.activations


def test_storages_counts_each_storage_once_while_anything_uses_it() -> None:
    with Storages() as storages:
        x = torch.zeros(256)
        view = x[:10].view(2, 5)
        assert storages.now == 1024
        y = x.requires_grad_().exp()  # kept for the backward pass, as itself
        del x, view
        assert storages.now == 2048
        loss = y.sum()
        del y
        assert storages.now == 2048 + 4
        loss.backward()
        del loss
        assert storages.now == 0  # the leaf has gone with the graph
    assert storages.take_peak() >= 3 * 1024
    assert storages.take_peak() == storages.now


def test_networks_of_other_resolutions() -> None:
    """The published widths of 1024 and 256 pixels are one family."""
    large = ResidualConfig(image_size=1024, channels=(16, 32, 64, 128, 256, 512, 512, 512))
    small = large.at_resolution(256)
    assert (small.image_size, small.channels) == (256, (64, 128, 256, 512, 512, 512))
    assert small.at_resolution(1024) == large
    with pytest.raises(UserError, match="300 pixels: this network halves 1024 pixels to 4"):
        large.at_resolution(300)
    style = StyleConfig(image_size=1024, startf=16)
    assert style.at_resolution(256) == StyleConfig()
    with pytest.raises(UserError, match="has no resolution"):
        MODELS["mlp"]().at_resolution(256)


def growing(tmp_path: Path) -> Path:
    path = tmp_path / "growing.yaml"
    style = {"name": "style", "image_size": 16, "startf": 4, "maxf": 6, "latent_size": 5, "mapping_layers": 2}
    growth = {"enabled": True, "batch": [12, 8, 6]}
    path.write_text(json.dumps({"model": style, "progressive": growth}))
    return path


def test_table_of_a_growing_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = growing(tmp_path)
    main(["memory", str(path), "--recompute-from", "16", "--processes", "2"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith("style")]
    assert [(row[1], row[3:5], row[5]) for row in rows] == [
        (pixels, ["from", "16"], images) for pixels, images in (("4", "6"), ("8", "4"), ("16", "3"))
    ]
    with pytest.raises(UserError, match="32 is no level of it"):
        list(memory_table.rows(path, Wish((32,))))


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text('{"model": {"image_size": 16, "channels": [4, 8], "zdim": 5}, "train": {"batch": 6}}')
    main(["memory", str(path), "--resolutions", "16", "32", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["resolution"], row["precision"]) for row in rows] == [(16, "fp32"), (32, "fp32")]
    for row in rows:
        b = row["bytes"]
        held = b["weights"] + b["gradients"] + b["optimizer"] + b["average"] + b["data"]
        assert row["images"] == 6 and b["total"] == held + b["activations"]
    assert rows[1]["bytes"]["total"] > rows[0]["bytes"]["total"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--recompute-from", "some"], "expected none or pixels"),
        (["--processes", "0"], "--processes 0"),
        (["--batch", "0"], "--batch 0"),
        (["--resolutions", "24"], "24 pixels"),
    ],
)
def test_wrong_wishes(tmp_path: Path, wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text('{"model": {"image_size": 16, "channels": [4, 8]}}')
    with pytest.raises(SystemExit) as left:
        main(["memory", str(path), *wrong])
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_overview_has_every_architecture_for_images() -> None:
    recipes = sorted((ROOT / "configs").glob(memory_table.OVERVIEW))
    shown = {from_dict(read_yaml(path), str(path)).model.name for path in recipes}
    assert shown == {name for name, cls in MODELS.items() if "image_size" in cls.__dataclass_fields__}

"""A growing style network through three levels: reports, pictures at each level, and an exact resume inside a fade."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import SMALL, final_files, results
from running import sivae_dist as run_command

import sivae_dist
from sivae_dist.engine import checkpoint
from sivae_dist.engine.config import from_dict
from sivae_dist.engine.dry_run import sizes
from sivae_dist.engine.dry_run_measure import measured, stretches_of
from sivae_dist.engine.judge import judge
from sivae_dist.engine.notes import unused
from sivae_dist.engine.progressive import GrowthConfig
from sivae_dist.engine.trainer import Trainer
from sivae_dist.errors import UserError

# Levels of 4, 8 and 16 px begin at 0, 120 and 240 images; 60 images of fade; batches 12, 8 and 6.
GROWTH = {
    **{"enabled": True, "level_kimg": 0.12, "fade_kimg": 0.06},
    **{"batch": [12, 8, 6], "lr": [0.002, 0.003], "beta_neg": [8, 16]},
}
STYLE = {"name": "style", "image_size": 16, "startf": 4, "maxf": 8, "latent_size": 6, "mapping_layers": 2}
PLAYER = {"beta1": 0.0, "beta2": 0.99}


def growing(shards: Path) -> dict:
    return {
        **SMALL,
        "model": STYLE,
        "objective": {"decoder_z": "reencode", "draws": "fresh"},
        "data": {**SMALL["data"], "url": str(shards), "workers": 0},
        "optim": {"name": "lreq_adam", "encoder": PLAYER, "decoder": PLAYER},
        "train": {"kimg": 0.36, "batch": 12},
        "progressive": GROWTH,
        "checkpoint": {"every_kimg": 0.03, "keep_last": 20},
        "tracking": {**SMALL["tracking"], "every_kimg": 0.02, "images_every_kimg": 0.12},
    }


@pytest.fixture(scope="module")
def grown(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("growing")
    sivae_dist.train(from_dict(growing(shards), "test"), folder / "run")
    return folder / "run"


def test_levels_follow_the_schedule(grown: Path) -> None:
    plan = GrowthConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in GROWTH.items()})
    rows = [json.loads(line) for line in (grown / "metrics.jsonl").read_text().splitlines()]
    reports = [row for row in rows if "progressive/level" in row]
    assert {row["progressive/resolution"] for row in reports} == {4, 8, 16}
    for row in reports:
        stage = plan.at(row["nimg"] - int(row["progressive/batch"]), 3)
        seen = (row["progressive/level"], row["progressive/blend"], row["progressive/batch"], row["lr/encoder"])
        assert seen == (stage.level, stage.blend, stage.batch, stage.lr)
    assert any(0 < row["progressive/blend"] < 1 for row in reports)
    sizes = {Image.open(path).size for path in (grown / "samples").glob("*.png")}
    assert all(np.asarray(Image.open(path)).std() > 1 for path in (grown / "samples").glob("*.png"))
    assert sizes  # cells are enlarged, so sizes need not differ


def test_evaluations_tell_their_resolution(grown: Path) -> None:
    """In metrics and checkpoints; what does not compare is not in the summary."""
    plan = GrowthConfig(enabled=True, level_kimg=0.12, fade_kimg=0.06)
    rows = [json.loads(line) for line in (grown / "metrics.jsonl").read_text().splitlines()]
    told = {row["nimg"]: row["eval/resolution"] for row in rows if "eval/psnr" in row}
    assert told == {nimg: float(4 << plan.at(max(0, nimg - 1), 3).level) for nimg in told}
    assert {told[0], told[max(told)]} == {4.0, 16.0}
    stored = checkpoint.read(checkpoint.latest(grown / "checkpoints")).state["metrics"]
    assert stored["eval/resolution"] == 16.0
    summary = json.loads((grown / "summary.json").read_text())
    assert "swd_ratio_to_untrained" not in summary and summary["metrics"]["eval/resolution"] == 16.0
    assert judge(grown, images=8)[0]["eval/resolution"] == 16.0


@pytest.mark.parametrize("nimg", [120, 152, 240, 264])
def test_resume_inside_a_fade_and_at_a_level(grown: Path, shards: Path, tmp_path: Path, nimg: int) -> None:
    start = [p for p in (grown / "checkpoints").glob("nimg-*") if int(p.name[5:]) >= nimg]
    start.sort()
    sivae_dist.train(from_dict(growing(shards), "test"), tmp_path / "run", str(start[0]))
    assert final_files(tmp_path / "run") == final_files(grown)
    begun = int(start[0].name[5:])
    assert results(tmp_path / "run") == [row for row in results(grown) if row["nimg"] > begun]


def test_a_checkpoint_is_used_at_its_level(grown: Path) -> None:
    coarse = sorted((grown / "checkpoints").glob("nimg-*"))[0]
    assert sivae_dist.load(coarse).sample(2).shape == (2, 3, 4, 4)
    finished = sivae_dist.load(grown)
    assert finished.sample(2).shape == (2, 3, 16, 16)
    assert torch.isfinite(finished.sample(2)).all()


def test_evaluated_below_its_full_size_on_a_pyramid(grown: Path, tmp_path: Path) -> None:
    """The pictures are those of training, averaged down, whether data.url names the level or the pyramid."""
    pyramid = tmp_path / "data"
    command = ["data", "scenes", str(pyramid / "16"), "--count", "88", "--resolution", "16", "--val-count", "16"]
    assert run_command(*command, "--shard-size", "20").returncode == 0
    coarse = sorted((grown / "checkpoints").glob("nimg-*"))[0]
    found = {}
    for name, url in (("level", pyramid / "16"), ("pyramid", pyramid)):
        run = tmp_path / name
        shutil.copytree(coarse, run / "checkpoints" / coarse.name)
        state = json.loads((run / "checkpoints" / coarse.name / "state.json").read_text())
        state["config"]["data"]["url"] = str(url)
        saved = checkpoint.read(coarse)
        shutil.rmtree(run)
        checkpoint.write(run / "checkpoints", replace(saved, state=state))
        found[name], picture = judge(run, images=16)
        assert picture.is_file()
    assert found["level"] == found["pyramid"]


def test_a_rehearsal_counts_the_pictures_as_they_come(shards: Path, tmp_path: Path) -> None:
    trainer = Trainer(from_dict(growing(shards), "test"), tmp_path / "run", "never", writes=False)
    stage = measured(trainer, next(stretches_of(trainer)))
    assert stage.shape == (3, 4, 4) and stage.data == 12 * 3 * 16 * 16
    assert stage.preparing >= 12 * (3 * 4 * 4 * 4 + 3 * 16 * 16 * 4)  # one slice is enough for so little
    assert sizes(trainer, [stage])["data"] == stage.data
    levels = [replace(stage, data=100), stage, replace(stage, preparing=1 << 30)]
    parts = sizes(trainer, levels)
    assert (parts["data"], parts["activations"]) == (stage.data, 1 << 30)  # of one level, not the most of each


def test_settings_that_growth_replaces_are_told(shards: Path) -> None:
    values = growing(shards)
    assert unused(from_dict({**values, "train": {"kimg": 0.36}}, "test"), 3) == []
    values["optim"] = {**values["optim"], "encoder": {**PLAYER, "lr": 0.007}}
    values["objective"] = {**values["objective"], "beta_neg": 3}
    told = unused(from_dict({**values, "train": {"batch": 13}}, "test"), 3)
    assert [line.split(" changes")[0] for line in told] == [
        "train.batch 13", "optim.encoder.lr 0.007", "objective.beta_neg 3"
    ]  # fmt: skip
    assert "progressive.beta_neg holds (16 at the last level)" in told[-1]
    assert unused(from_dict({**values, "progressive": {}}, "test"), 1) == []


def test_rates_may_change_when_it_goes_on(grown: Path, shards: Path, tmp_path: Path) -> None:
    values = {**growing(shards), "progressive": {**GROWTH, "lr": [0.001], "beta_neg": [4]}}
    start = sorted((grown / "checkpoints").glob("nimg-*"))[-2]
    sivae_dist.train(from_dict(values, "test"), tmp_path / "run", str(start))
    assert {row["lr/encoder"] for row in results(tmp_path / "run") if "lr/encoder" in row} == {0.001}
    values["progressive"] = {**GROWTH, "level_kimg": 0.06}
    with pytest.raises(UserError, match=r"trained with progressive.level_kimg 0.12 \(now 0.06\)"):
        sivae_dist.train(from_dict(values, "test"), tmp_path / "run")


def test_growing_needs_levels(shards: Path, tmp_path: Path) -> None:
    values = {**growing(shards), "model": SMALL["model"], "optim": {}}
    with pytest.raises(UserError, match="works at one resolution only"):
        sivae_dist.train(from_dict(values, "test"), tmp_path / "run")
    with pytest.raises(UserError, match="both would set"):
        from_dict({**growing(shards), "controller": {"enabled": True}}, "test")

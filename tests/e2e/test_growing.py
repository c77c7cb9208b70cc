"""A growing style network through three levels: reports, pictures at each level, and an exact resume inside a fade."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import SMALL, final_files, results

import sivae_dist
from sivae_dist.engine.config import from_dict
from sivae_dist.engine.progressive import GrowthConfig
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


def test_growing_needs_levels(shards: Path, tmp_path: Path) -> None:
    values = {**growing(shards), "model": SMALL["model"], "optim": {}}
    with pytest.raises(UserError, match="works at one resolution only"):
        sivae_dist.train(from_dict(values, "test"), tmp_path / "run")
    with pytest.raises(UserError, match="both would set"):
        from_dict({**growing(shards), "controller": {"enabled": True}}, "test")

"""Small models saved as runs: real checkpoint folders, without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sivae_dist.engine import checkpoint
from sivae_dist.engine.config import RunConfig, from_dict, to_dict
from sivae_dist.models import Autoencoder

STYLE = {
    "name": "style",
    "image_size": 16,
    "startf": 4,
    "maxf": 6,
    "latent_size": 5,
    "mapping_layers": 2,
    "truncation_cutoff": 8,
}
MODULATED = {
    "name": "modulated",
    "image_size": 16,
    "channel_base": 64,
    "channel_max": 8,
    "latent_size": 5,
    "mapping_layers": 2,
}
RESIDUAL = {"name": "residual", "image_size": 16, "channels": [4, 8], "zdim": 6}


def save(folder: Path, model: dict[str, Any], *, nimg: int = 0, **sections: Any) -> Path:
    """A run folder with one checkpoint. Seeded weights; noise and average styles that show. Weights differ from EMA."""
    config = from_dict({"model": model, "data": {"url": "nowhere"}, **sections}, "test")
    states = [built(config, seed).state_dict() for seed in (0, 1)]
    saved = checkpoint.Snapshot(
        nimg, {"weights": states[0], "ema": states[1], "optimizer": {}}, {"config": to_dict(config)}
    )
    checkpoint.write(folder / "checkpoints", saved)
    return folder


def built(config: RunConfig, seed: int) -> Autoencoder:
    torch.manual_seed(seed)
    model = config.model.build()
    for name, tensor in model.state_dict().items():
        if "noise_weight" in name or "noise_strength" in name:
            tensor.fill_(0.5)
        if "dlatent_avg" in name:
            tensor.normal_()
    return model

"""A trained model for use: `sivae_dist.load(path)`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sivae_dist import counters
from sivae_dist.config import RunConfig, from_dict
from sivae_dist.engine import checkpoint
from sivae_dist.errors import UserError
from sivae_dist.models import Autoencoder, Posterior


class Trained:
    """A model in evaluation mode, with averaged weights. Images are (B, C, H, W) in `input_range`."""

    def __init__(self, model: Autoencoder, config: RunConfig, nimg: int) -> None:
        self.model, self.config, self.nimg = model.eval().requires_grad_(False), config, nimg
        self.input_range = model.input_range

    @torch.no_grad()
    def encode(self, x: Tensor, condition: Tensor | None = None) -> Posterior:
        """x (B, *sample_shape) -> Posterior(mu, logvar), each (B, *latent shape)."""
        return self.model.encode(x, condition)

    @torch.no_grad()
    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """z (B, *latent shape) -> x_hat (B, *sample_shape), clamped to input_range."""
        x_hat = self.model.decode(z, condition)
        return x_hat.clamp(*self.input_range) if self.input_range is not None else x_hat

    def sample(self, n: int, seed: int = 0, condition: Tensor | None = None) -> Tensor:
        """n samples from the prior; the first k of n are the k of sample(k, seed)."""
        parameter = next(self.model.parameters())
        numbers = torch.arange(n, device=parameter.device)
        eps = counters.normal(counters.key(seed, "sample"), numbers, self.model.prior.shape, parameter.dtype)
        return self.decode(self.model.prior.sample(eps), condition)

    def reconstruct(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """decode(mean of encode(x))."""
        return self.decode(self.encode(x, condition).mu, condition)


def load(path: str | Path, *, average: bool = True, device: str | torch.device = "cpu") -> Trained:
    """A model from a run folder (its latest checkpoint) or a checkpoint folder.

    average: the averaged weights (EMA) rather than the current ones.
    Raises UserError when there is no readable checkpoint.
    """
    folder = Path(path)
    found = folder if (folder / "files.json").is_file() else checkpoint.latest(folder / "checkpoints")
    if found is None:
        raise UserError(f"there is no checkpoint in {folder}", "give a run folder or one of its checkpoints")
    saved = checkpoint.read(found)
    config = from_dict(saved.state.get("config", {}), f"{found}/state.json")
    model = config.model.build()
    checkpoint.load_weights(model, saved.tensors["ema" if average else "weights"], str(found))
    if config.progressive.enabled:  # a model that still grows is used at the level it has reached
        stage = config.progressive.at(max(0, saved.nimg - 1), model.levels)
        model.set_level(stage.level, stage.blend)
    return Trained(model.to(device), config, saved.nimg)

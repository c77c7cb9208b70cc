"""Moving average of weights and buffers, with its half-life in images, so that it means the same at any batch size."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sivae_dist.distributed.sharding import local
from sivae_dist.errors import UserError
from sivae_dist.models import Autoencoder


@dataclass(frozen=True)
class EmaConfig:
    """Averaged weights, used for evaluation and samples."""

    half_life_kimg: float = 10.0
    """After this many thousand images an old weight counts half. 0 copies the weights (no averaging)."""
    rampup: float = 0.05
    """Early on the half-life is at most this fraction of the images seen, so that the start is forgotten."""

    def __post_init__(self) -> None:
        if self.half_life_kimg < 0 or self.rampup < 0:
            raise UserError(
                f"ema.half_life_kimg {self.half_life_kimg} and ema.rampup {self.rampup} must not be negative",
                "0 switches averaging (or its ramp) off",
            )

    def beta(self, nimg: int, batch: int) -> float:
        """Weight of the old average in the update after an iteration of `batch` images that ended at `nimg`."""
        half_life = self.half_life_kimg * 1000
        if self.rampup > 0:
            half_life = min(half_life, nimg * self.rampup)
        return 0.5 ** (batch / half_life) if half_life > 0 else 0.0


class Ema:
    """Holds the averaged model (`model`), in evaluation mode, never trained.

    twin: takes the weights of `model` and is averaged, where `model` cannot be copied (fake tensors cannot).
    """

    def __init__(self, config: EmaConfig, model: Autoencoder, twin: Autoencoder | None = None) -> None:
        self.config = config
        if twin is not None:
            twin.load_state_dict(model.state_dict())
        self.model = (twin or copy.deepcopy(model)).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: Autoencoder, nimg: int, batch: int) -> None:
        """average <- beta average + (1 - beta) current, for weights and floating-point buffers; counters are copied."""
        beta = self.config.beta(nimg, batch)
        averages: list[Tensor] = []
        currents: list[Tensor] = []
        for average, current in self._pairs(model):
            if average.is_floating_point():
                averages.append(average)
                currents.append(current)
            else:
                average.copy_(current)
        torch._foreach_lerp_(averages, currents, 1.0 - beta)

    def _pairs(self, model: Autoencoder) -> Iterator[tuple[Tensor, Tensor]]:
        """Average and current value of everything in the state dicts; of sharded parameters, what this rank holds."""
        for average, current in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            yield local(average), local(current)

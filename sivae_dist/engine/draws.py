"""What a stochastic decoder draws, as a function of position: see `models.base.DecoderDraws`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sivae_dist import counters


@dataclass(frozen=True)
class PositionDraws:
    """Draws keyed by (key, name of the draw, number of the sample or of the batch).

    key:      stands for run, purpose and decoder call
    position: (B,) int64 numbers of the samples, on the model's device
    batch:    number of the global batch's first image, which keys what the whole batch shares
    mean:     mean over the samples of all ranks, (B, ...) -> (...)
    """

    key: int
    position: Tensor
    batch: int
    dtype: torch.dtype
    from_prior: bool
    mean: Callable[[Tensor], Tensor]

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (B, *shape)."""
        return counters.normal(counters.key(self.key, name), self.position, shape, self.dtype)

    def shared_normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (1, *shape), the same on every rank."""
        number = torch.full((1,), self.batch, dtype=torch.int64, device=self.position.device)
        return counters.normal(counters.key(self.key, "batch", name), number, shape, self.dtype)

    def uniform(self, name: str) -> float:
        """One number in [0, 1), the same on every rank."""
        return (counters.key(self.key, "uniform", name, self.batch) >> 11) * 2.0**-53

    def batch_mean(self, rows: Tensor) -> Tensor:
        """Mean of rows (B, F) over the samples of all ranks: (F,)."""
        return self.mean(rows)


@dataclass(frozen=True)
class OwnDraws(PositionDraws):
    """As if every sample were decoded in a batch of its own: nothing depends on which samples are decoded together.

    For looking at a model and judging it, where samples are numbered and batches are an accident. What a batch shares
    is drawn for each sample, (B, *shape) instead of (1, *shape).
    """

    def shared_normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (B, *shape)."""
        return counters.normal(counters.key(self.key, "batch", name), self.position, shape, self.dtype)


def own_draws(seed: int, purpose: str, position: Tensor, dtype: torch.dtype, *, from_prior: bool) -> OwnDraws:
    """OwnDraws of the samples numbered `position` (B,), keyed by (seed, purpose)."""
    key = counters.key(seed, "decoder", purpose)
    return OwnDraws(key, position, 0, dtype, from_prior, lambda rows: rows.mean(dim=0))

"""Data for any architecture: samples drawn from their positions, without files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from sivae_dist import counters
from sivae_dist.data import DataConfig, HostBatch
from sivae_dist.models import Autoencoder


class MemoryStream:
    """A `data.base.Stream` of smooth random images, or of normally distributed points."""

    held_out_split = "val"
    fingerprint = "0" * 64

    def __init__(self, config: MemoryConfig, rank: int, ranks: int) -> None:
        self.sample_shape, self.classes, self.epoch_size = config.sample_shape, config.classes, 24
        self.rank, self.ranks = rank, ranks

    def make(self, positions: list[int]) -> HostBatch:
        position = torch.tensor(positions, dtype=torch.int64)
        drawn = counters.normal(counters.key(3, "data"), position % self.epoch_size, self.sample_shape, torch.float32)
        data = drawn if len(self.sample_shape) == 1 else (drawn.sigmoid() * 255).to(torch.uint8)
        return HostBatch(data, position, position % self.classes if self.classes else None)

    def batches(self, start: int, size: int | Callable[[int], int]) -> Iterator[HostBatch]:
        while True:
            step = size if isinstance(size, int) else size(start)
            yield self.make([p for p in range(start, start + step) if p % self.ranks == self.rank])
            start += step

    def held_out(self, limit: int, batch: int = 32) -> list[HostBatch]:
        mine = [p for p in range(min(limit, self.epoch_size)) if p % self.ranks == self.rank]
        return [self.make(mine[i * batch : (i + 1) * batch]) for i in range(math.ceil(len(mine) / batch))]

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class MemoryConfig(DataConfig):
    """Not registered: a run on it can be resumed, since only the model's settings must be those of the checkpoint."""

    name: str = "memory"
    sample_shape: tuple[int, ...] = (3, 16, 16)
    classes: int = 0

    @classmethod
    def of(cls, model: Autoencoder) -> MemoryConfig:
        return cls(sample_shape=model.sample_shape, classes=model.condition_dim)

    def build(self, *, seed: int, salt: int, rank: int, ranks: int) -> MemoryStream:
        return MemoryStream(self, rank, ranks)

"""The 2-D densities of the papers' toy experiments, as an endless stream: every point is computed from its number.

Definitions are those of the public Soft-IntroVAE code (which took them from the literature on normalising flows):
    8gaussians    eight centres on a circle of radius 2, N(0, 0.02^2) around them, all divided by 1.414
    2spirals      arms r(t) = +-(-t cos t, t sin t), t = 3 pi sqrt(u), each coordinate plus u' / 2 (sign of the arm
                  included), divided by 3, plus N(0, 0.1^2). Points 2k and 2k + 1 are one draw on both arms, as there
    checkerboard  x_1 uniform on [-2, 2), x_2 = u - 2 b + (floor(x_1) mod 2), b a fair coin; both times 2
    rings         radii 3, 2.25, 1.5, 0.75, equally likely, uniform angle, plus N(0, 0.08^2)
    25gaussians   a 5 x 5 grid of step 2, N(0, 0.05^2) around its points, divided by 2.828, times 2
There rings take their angles from a finite grid that depends on the batch; here they are continuous.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from sivae_dist import counters
from sivae_dist.data.base import DataConfig, HostBatch
from sivae_dist.errors import UserError

Density = Literal["8gaussians", "2spirals", "checkerboard", "rings", "25gaussians"]
Points = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]

# Half the side of the square, centred at the origin, that the published evaluation looks at.
EXTENT: dict[Density, float] = {"8gaussians": 2.0, "2spirals": 4.0, "checkerboard": 4.0, "rings": 4.0, "25gaussians": 4}
EPOCH = 100_000  # points that reports call an epoch; there is no end of them
_VERSION = 1  # of the formulas below: part of the fingerprint
_AHEAD = 1 << 15  # points computed together, whatever the batch: a call for each batch costs more than its points


@dataclass(frozen=True)
class Toy2dConfig(DataConfig):
    """Points of a 2-D density."""

    name: str = "toy2d"
    density: Density = "8gaussians"
    """8gaussians, 2spirals, checkerboard, rings or 25gaussians."""

    def build(self, *, seed: int, salt: int, rank: int, ranks: int) -> Toy2dStream:
        """Point number p of the stream is a function of (density, seed, salt, p)."""
        return Toy2dStream(self.density, seed=seed, salt=salt, rank=rank, ranks=ranks)


class Toy2dStream:
    """The `data.base.Stream` of a density. Held-out points have draws of their own, the same for every seed."""

    held_out_split = "val"
    classes = 0
    epoch_size = EPOCH
    sample_shape: tuple[int, ...] = (2,)

    def __init__(self, density: Density, *, seed: int = 0, salt: int = 0, rank: int = 0, ranks: int = 1) -> None:
        if density not in DENSITIES:
            raise UserError(f"data.density is {density!r}, which is not known", f"choose one of {', '.join(DENSITIES)}")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} of {ranks}")
        self.density, self.rank, self.ranks = density, rank, ranks
        self.extent = EXTENT[density]
        self.fingerprint = hashlib.sha256(f"toy2d {density} {_VERSION}".encode()).hexdigest()
        self._train, self._held_out = counters.key(seed, "toy2d", density, salt), counters.key(0, "toy2d", density, -1)

    def batches(self, start: int, size: int | Callable[[int], int]) -> Iterator[HostBatch]:
        """Endless: this rank's points of the global batches [start, start+size), [start+size, start+2 size), ...

        size: of all batches, or a function of the position where a batch starts.
        """
        if start < 0 or (isinstance(size, int) and size < 1):
            raise ValueError(f"batches from position {start} of size {size}")
        while True:
            parts: list[Positions] = []
            first = start
            while not parts or start - first < _AHEAD:
                end = start + (size if isinstance(size, int) else size(start))
                parts.append(np.arange(start + self.rank, end, self.ranks, dtype=np.int64))
                start = end
            yield from self._split(self._train, parts)

    def held_out(self, limit: int, batch: int = 32) -> list[HostBatch]:
        """Every ranks-th of the first `limit` held-out points (there is no end of them), in batches of `batch`."""
        mine = np.arange(self.rank, limit, self.ranks, dtype=np.int64)
        parts = [mine[i : i + batch] for i in range(0, len(mine), batch)]
        return list(self._split(self._held_out, parts)) if parts else []

    def close(self) -> None:
        """Nothing is open."""

    def _split(self, key: int, parts: list[Positions]) -> Iterator[HostBatch]:
        position = np.concatenate(parts)
        data = torch.from_numpy(DENSITIES[self.density](key, position).astype(np.float32))
        sizes, numbers = [len(part) for part in parts], torch.from_numpy(position)
        for x, mine in zip(torch.split(data, sizes), torch.split(numbers, sizes), strict=True):
            yield HostBatch(x, mine)


def _uniform(key: int, name: str, number: Positions) -> Points:
    return counters.uniform(counters.key(key, name), number.astype(np.uint64))


def _normal(key: int, number: Positions) -> Points:
    draws = counters.normal(counters.key(key, "normal"), torch.from_numpy(number), (2,), torch.float64)
    return np.asarray(draws.numpy(), dtype=np.float64)


def _eight_gaussians(key: int, number: Positions) -> Points:
    angle = np.floor(8 * _uniform(key, "centre", number)) * (math.pi / 4)
    return (2 * _direction(angle) + 0.02 * _normal(key, number)) / 1.414


def _grid_of_gaussians(key: int, number: Positions) -> Points:
    cell = np.floor(25 * _uniform(key, "centre", number))
    centre = 2 * np.stack([cell // 5 - 2, cell % 5 - 2], axis=1)
    return (centre + 0.05 * _normal(key, number)) / 2.828 * 2


def _two_spirals(key: int, number: Positions) -> Points:
    pair, arm = number // 2, 1.0 - 2.0 * (number % 2)
    t = 3 * math.pi * np.sqrt(_uniform(key, "t", pair))
    aside = np.stack([_uniform(key, "aside 1", pair), _uniform(key, "aside 2", pair)], axis=1)
    spiral = t[:, None] * np.stack([-np.cos(t), np.sin(t)], axis=1) + aside / 2
    return np.asarray(arm[:, None] * spiral / 3 + 0.1 * _normal(key, number), dtype=np.float64)


def _checkerboard(key: int, number: Positions) -> Points:
    across = 4 * _uniform(key, "across", number) - 2
    row = np.where(_uniform(key, "coin", number) < 0.5, 0.0, 2.0)
    up = _uniform(key, "up", number) - row + np.floor(across) % 2
    square: Points = np.stack([across, up], axis=1)
    return 2 * square


def _rings(key: int, number: Positions) -> Points:
    radius = 3 - 0.75 * np.floor(4 * _uniform(key, "ring", number))
    return radius[:, None] * _direction(2 * math.pi * _uniform(key, "angle", number)) + 0.08 * _normal(key, number)


def _direction(angle: Points) -> Points:
    direction: Points = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return direction


DENSITIES: dict[Density, Callable[[int, Positions], Points]] = {
    "8gaussians": _eight_gaussians,
    "2spirals": _two_spirals,
    "checkerboard": _checkerboard,
    "rings": _rings,
    "25gaussians": _grid_of_gaussians,
}

"""Progressive growing as a function of the images seen: which resolution, how far faded in, with what settings.

Pure: nothing here trains or remembers. A model with levels (see models.base.Autoencoder) starts at level 0; every level
lasts equally long, and the last one lasts until the end. Each new level is first faded in: images are `blended` with
their coarser version, and so are what the networks make of them (`Autoencoder.set_level`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor
from torch.nn import functional

from sivae_dist.errors import UserError

Number = TypeVar("Number", int, float)
RESOLUTION = "eval/resolution"  # among the metrics of an evaluation


@dataclass(frozen=True)
class Stage:
    """What holds for one iteration.

    level, blend: for Autoencoder.set_level
    batch:        images of the iteration over all ranks
    lr:           learning rate of both players, before the schedule of `optim`
    beta_neg:     of the objective
    """

    level: int
    blend: float
    batch: int
    lr: float
    beta_neg: float


@dataclass(frozen=True)
class GrowthConfig:
    """How a model grows. Lists go from level 0 up; where they are shorter than the model, their last entry holds on.

    While it is enabled, its batch, lr and beta_neg take the place of train.batch, optim.encoder.lr, optim.decoder.lr
    and objective.beta_neg, which then change nothing.

    Defaults: the public FFHQ recipe on four GPUs, 16 epochs of 60,000 images a level.
    """

    enabled: bool = False
    """Off: the model works at its full resolution from the start."""
    level_kimg: float = 960.0
    """Thousand images that each level lasts."""
    fade_kimg: float = 480.0
    """Thousand images at the start of each level but the first over which it is faded in."""
    batch: tuple[int, ...] = (512, 256, 128, 64, 32, 32, 16, 8, 4)
    """Images an iteration, over all ranks."""
    lr: tuple[float, ...] = (0.0015, 0.0015, 0.0015, 0.0015, 0.0015, 0.0015, 0.002, 0.003, 0.003)
    """Learning rate of both players."""
    beta_neg: tuple[float, ...] = (2048, 2048, 2048, 1024, 512, 512, 512, 512, 512)
    """The objective's beta_neg."""
    beta_neg_lag_kimg: float = 0.0
    """How much later than the level beta_neg changes. The public code chooses it before it is told of the new epoch:
    one epoch."""

    def __post_init__(self) -> None:
        if not 0 <= self.fade_kimg <= self.level_kimg or self.level_kimg <= 0 or self.beta_neg_lag_kimg < 0:
            raise UserError(
                f"progressive: level_kimg {self.level_kimg}, fade_kimg {self.fade_kimg}, beta_neg_lag_kimg "
                f"{self.beta_neg_lag_kimg} do not fit together",
                "level_kimg must be positive, fade_kimg between 0 and level_kimg, the lag 0 or more",
            )
        for name in ("batch", "lr", "beta_neg"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise UserError(
                    f"progressive.{name} is {getattr(self, name)}, expected positive numbers, one a level",
                    "give at least one; the last one holds for all further levels",
                )

    def level(self, nimg: int, levels: int) -> int:
        """The level of a model with `levels` levels for the iteration that starts after `nimg` images."""
        return min(levels - 1, nimg // _images(self.level_kimg))

    def at(self, nimg: int, levels: int) -> Stage:
        """Everything for the iteration that starts after `nimg` images. blend rises from 0 to 1 as a half cosine."""
        level = self.level(nimg, levels)
        into, fade, blend = nimg - level * _images(self.level_kimg), _images(self.fade_kimg), 1.0
        if level > 0 and into < fade:
            blend = 0.5 - 0.5 * math.cos(math.pi * into / fade)
        behind = self.level(max(0, nimg - _images(self.beta_neg_lag_kimg)), levels)
        return Stage(level, blend, _held(self.batch, level), _held(self.lr, level), _held(self.beta_neg, behind))

    def evaluated(self, resolution: int) -> dict[str, float]:
        """What an evaluation of images of so many pixels a side tells besides its metrics; nothing without growth."""
        return {RESOLUTION: float(resolution)} if self.enabled else {}

    def grown(self, levels: int) -> int:
        """The fewest images after which a model is wholly at its finest level: what the last one of them was seen at.

        A checkpoint is used at the stage of the iteration before it, `at(nimg - 1)`.
        """
        last = levels - 1
        return last * _images(self.level_kimg) + (_images(self.fade_kimg) if last else 0) + 1


def blended(x: Tensor, blend: float) -> Tensor:
    """Images (B, C, H, W) with their details faded in: blend x + (1 - blend) x at half the resolution."""
    if blend == 1:
        return x
    coarse = functional.interpolate(functional.avg_pool2d(x, 2), scale_factor=2, mode="nearest")
    return blend * x + (1 - blend) * coarse


def _images(kimg: float) -> int:
    return round(1000 * kimg)


def _held(values: tuple[Number, ...], level: int) -> Number:
    return values[min(level, len(values) - 1)]

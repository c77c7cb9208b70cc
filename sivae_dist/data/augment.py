"""Random changes of training pictures, drawn from their positions in the stream and made on the device.

What is drawn for a picture is a function of (seed, purpose, position): it depends neither on ranks and workers nor on
what came before, a resumed run makes the same changes, and the next epoch makes others. The order is shift, mirror,
hue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sivae_dist.counters import coin, key, uniform
from sivae_dist.errors import UserError

Fill = Literal["white", "black", "edge", "reflect"]


@dataclass(frozen=True)
class Drawn:
    """What happens to each of B pictures; None where nothing of the kind does.

    mirror: (B,) bool, which to flip left-right
    shift:  (B, 2) int64, pixels down and pixels to the right
    fill:   what enters at the borders: white, black, the outermost pixel, or the picture reflected at it
    hue:    (B,) float32, turns of the colour circle, in [-0.5, 0.5]
    """

    mirror: Tensor | None = None
    shift: Tensor | None = None
    fill: Fill = "white"
    hue: Tensor | None = None

    def pin_memory(self) -> Drawn:
        """Page-locked copy."""
        mirror, shift, hue = (None if t is None else t.pin_memory() for t in (self.mirror, self.shift, self.hue))
        return Drawn(mirror, shift, self.fill, hue)

    def part(self, rows: slice) -> Drawn:
        """What happens to some of the pictures."""
        mirror, shift, hue = (None if t is None else t[rows] for t in (self.mirror, self.shift, self.hue))
        return Drawn(mirror, shift, self.fill, hue)

    def on(self, device: torch.device) -> Drawn:
        """The same on a device."""
        tensors = (self.mirror, self.shift, self.hue)
        mirror, shift, hue = (None if t is None else t.to(device, non_blocking=True) for t in tensors)
        return Drawn(mirror, shift, self.fill, hue)

    def move(self, x: Tensor) -> Tensor:
        """Shifts and mirrors bytes: x (B, C, H, W) uint8 -> the same."""
        if self.shift is not None:
            x = shifted(x, self.shift.to(x.device, non_blocking=True), self.fill)
        if self.mirror is not None:
            flip = self.mirror.to(x.device, non_blocking=True).view(-1, *[1] * (x.dim() - 1))
            x = torch.where(flip, x.flip(-1), x)
        return x

    def colour(self, x: Tensor) -> Tensor:
        """Turns the hues: x (B, 3, H, W) floating point in any range -> the same."""
        return x if self.hue is None else hue_turned(x, self.hue.to(x.device, x.dtype, non_blocking=True))


@dataclass(frozen=True)
class Augmentation:
    """Which changes are made, and the seed that keys them. Raises UserError for settings that cannot be."""

    seed: int
    mirror: bool = False
    shift_px: int = 0
    shift_fill: Fill = "white"
    hue: float = 0.0

    def __post_init__(self) -> None:
        if self.shift_px < 0:
            raise UserError(f"data.shift_px is {self.shift_px}, expected 0 or more pixels", "correct data.shift_px")
        if self.shift_fill not in get_args(Fill):
            raise UserError(f"data.shift_fill is {self.shift_fill!r}", f"use one of {', '.join(get_args(Fill))}")
        if not 0 <= self.hue <= 0.5:
            raise UserError(
                f"data.hue is {self.hue}, expected 0 to 0.5 turns", "0.5 is any hue, 0 leaves colours alone"
            )

    def check(self, channels: int, resolution: int) -> None:
        """Raises UserError for what pictures of this kind cannot have done to them."""
        if self.hue and channels != 3:
            raise UserError(f"data.hue is {self.hue}, but the pictures have {channels} channel(s)", "set data.hue to 0")
        if self.shift_px >= resolution:
            raise UserError(
                f"data.shift_px is {self.shift_px}, but the pictures have {resolution} pixels a side",
                "lower data.shift_px",
            )

    def draw(self, positions: np.ndarray) -> Drawn:
        """What happens to the pictures at these positions (B,)."""
        mirror = shift = hue = None
        if self.mirror:
            mirror = torch.from_numpy(coin(key(self.seed, "mirror"), positions))
        if self.shift_px:
            shift = torch.from_numpy(np.stack([self._pixels(axis, positions) for axis in ("down", "right")], axis=1))
        if self.hue:
            turns = self.hue * (2.0 * uniform(key(self.seed, "hue"), positions) - 1.0)
            hue = torch.from_numpy(turns.astype(np.float32))
        return Drawn(mirror, shift, self.shift_fill, hue)

    def _pixels(self, axis: str, positions: np.ndarray) -> np.ndarray:
        """-shift_px ... shift_px: a uniform number, rounded. So the ends come half as often, as in RandomAffine."""
        draws = uniform(key(self.seed, "shift", axis), positions)
        return np.rint(self.shift_px * (2.0 * draws - 1.0)).astype(np.int64)


def shifted(x: Tensor, shift: Tensor, fill: Fill) -> Tensor:
    """x (B, C, H, W) uint8, shift (B, 2) whole pixels down and right, below the picture's size -> (B, C, H, W)."""
    batch, _, height, width = x.shape
    rows, row_out = _sources(shift[:, 0], height, fill)
    columns, column_out = _sources(shift[:, 1], width, fill)
    number = torch.arange(batch, device=x.device)[:, None, None]
    moved = x.movedim(1, -1)[number, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    if fill in {"edge", "reflect"}:
        return moved
    outside = (row_out[:, :, None] | column_out[:, None, :])[:, None]
    return moved.masked_fill(outside, 255 if fill == "white" else 0)


def _sources(shift: Tensor, size: int, fill: Fill) -> tuple[Tensor, Tensor]:
    """Where each place takes its pixel from (B, size), and whether that lay outside of the picture."""
    source = torch.arange(size, device=shift.device) - shift[:, None]
    outside = (source < 0) | (source >= size)
    if fill == "reflect":
        source = (size - 1) - ((size - 1) - source.abs()).abs()
    return source.clamp(0, size - 1), outside


def hue_turned(x: Tensor, turns: Tensor) -> Tensor:
    """Adds `turns` (B,) to the hue of x (B, 3, H, W), in the hexcone model HSV (A. R. Smith, 1978).

    Value and saturation stay, and black, grey and white to the last bit. Scaling x or adding to it commutes with this,
    so any range will do. The model that torchvision's adjust_hue uses; its version for PIL images also rounds hue,
    saturation and value to 8 bits each, which is not done here.
    """
    value, darkest = x.amax(1), x.amin(1)
    chroma = value - darkest
    red, green, blue = x.unbind(1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )  # in sixths of a turn, from -1 to 5
    hue = hue + 6.0 * turns.view(-1, 1, 1)
    # A channel falls below the value by chroma * its distance from the sector in which it is the largest.
    offset = torch.tensor([5.0, 3.0, 1.0], device=x.device, dtype=x.dtype).view(1, 3, 1, 1)
    sector = (offset + hue[:, None]) % 6.0
    return value[:, None] - chroma[:, None] * torch.minimum(sector, 4.0 - sector).clamp(0.0, 1.0)

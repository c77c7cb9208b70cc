"""Pictures of 2-D points and of functions on a square, drawn without a plotting library."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sivae_dist.evaluation.grids import Pixels

_INK = (31, 95, 168)
# Dark to light, evenly rising in lightness, so that it reads in grey, too.
_HEAT = np.array([(0, 0, 20), (60, 10, 100), (150, 35, 110), (225, 80, 60), (250, 165, 40), (252, 250, 190)])


def scatter(x: Tensor, extent: float, *, size: int = 256, ink: tuple[int, int, int] = _INK) -> Pixels:
    """(N, 2) -> uint8 (size, size, 3): points in [-extent, extent]^2 on white, the second coordinate upwards.

    A point is a cross of five pixels, darker where several fall. What lies outside is on no picture.
    """
    place = (x.detach().cpu().double() / extent + 1) / 2 * size
    place = place[((place >= 0) & (place < size)).all(1)]
    column, row = place[:, 0].floor().long(), size - 1 - place[:, 1].floor().long()
    amount = torch.zeros(size, size, dtype=torch.float64)
    for across, down in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
        c, r = column + across, row + down
        inside = (c >= 0) & (c < size) & (r >= 0) & (r < size)
        flat = torch.bincount(r[inside] * size + c[inside], minlength=size * size)
        amount += flat.reshape(size, size) * (1.0 if across == down == 0 else 0.5)
    cover = (1 - torch.exp(-0.9 * amount))[..., None].numpy()
    picture: Pixels = np.rint(255 - cover * (255 - np.array(ink))).astype(np.uint8)
    return picture


def heat(values: Tensor, *, size: int = 256) -> Pixels:
    """(n, n) values at (x_1, x_2) -> uint8 (size, size, 3): least dark, largest light, the second coordinate upwards.

    Values that are not finite are magenta.
    """
    v = values.detach().cpu().double().T.flip(0).numpy()
    finite = np.isfinite(v)
    low, high = (v[finite].min(), v[finite].max()) if finite.any() else (0.0, 1.0)
    share = np.where(finite, v - low, 0) / max(high - low, 1e-300)
    steps = np.linspace(0, 1, len(_HEAT))
    colours = np.stack([np.interp(share, steps, _HEAT[:, channel]) for channel in range(3)], axis=-1)
    colours[~finite] = (255, 0, 255)
    rows = np.minimum((np.arange(size) + 0.5) * len(v) / size, len(v) - 1).astype(int)
    picture: Pixels = np.rint(colours[np.ix_(rows, rows)]).astype(np.uint8)
    return picture


def side_by_side(rows: list[list[Pixels]], separator: int = 6) -> Pixels:
    """Pictures of one size in rows, white lines between them; a short row is filled up with white."""
    height, width = rows[0][0].shape[:2]
    columns = max(map(len, rows))
    shape = (len(rows) * (height + separator) - separator, columns * (width + separator) - separator, 3)
    sheet = np.full(shape, 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            sheet[i * (height + separator) :, j * (width + separator) :][:height, :width] = picture
    return sheet

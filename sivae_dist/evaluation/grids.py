"""Pictures of pictures: rows of samples side by side, for TensorBoard and for the samples folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from sivae_dist.files import replacing

Pixels: TypeAlias = npt.NDArray[np.uint8]

_SEPARATOR = 255  # grey level between cells and in empty cells
_NONFINITE = (255, 0, 255)  # magenta: a NaN must be seen, not look like black or white


def grid(
    rows: Sequence[Tensor],
    input_range: tuple[float, float],
    *,
    min_cell: int = 96,
    max_cell: int | None = None,
    separator: int = 2,
) -> Pixels:
    """One picture with one line per tensor, e.g. [real, reconstructions, samples]. Returns uint8 (H, W, 3).

    rows: (N, C, H, W) each, C = 1 (shown grey) or 3, clamped to `input_range` and rounded to nearest; N may differ,
        missing cells stay white.
    input_range: what becomes 0 and 255.
    min_cell: smaller images are enlarged by the least whole factor that reaches it, without smoothing.
    max_cell: larger images are area-averaged down by the least whole factor that suits; None never shrinks.
    separator: width of the lines between cells, in pixels.
    Values that are not finite are shown magenta. Raises ValueError when rows is empty or shapes disagree.
    """
    if not rows or any(row.dim() != 4 for row in rows):
        raise ValueError(f"grid wants (N, C, H, W) tensors, not {[tuple(row.shape) for row in rows]}")
    if len({tuple(row.shape[1:]) for row in rows}) != 1 or rows[0].shape[1] not in (1, 3):
        raise ValueError(f"grid wants 1 or 3 channels and one size in all rows, not {[tuple(r.shape) for r in rows]}")
    lines = [cells(row, input_range, min_cell=min_cell, max_cell=max_cell) for row in rows]
    height, width = lines[0].shape[1:3]
    columns = max(len(line) for line in lines)
    picture = np.full(
        (len(lines) * (height + separator) - separator, columns * (width + separator) - separator, 3),
        _SEPARATOR,
        dtype=np.uint8,
    )
    for i, line in enumerate(lines):
        for j, cell in enumerate(line):
            top, left = i * (height + separator), j * (width + separator)
            picture[top : top + height, left : left + width] = cell
    return picture


def cells(row: Tensor, input_range: tuple[float, float], *, min_cell: int = 96, max_cell: int | None = None) -> Pixels:
    """(N, C, H, W) in input_range -> uint8 (N, H', W', 3), as `grid` shows them."""
    low, high = input_range
    x = row.detach().cpu().float()
    longest = max(x.shape[2:])
    if max_cell is not None and longest > max_cell:
        x = torch.nn.functional.avg_pool2d(x, -(-longest // max_cell))
    x = x.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    finite = x.isfinite().all(dim=3, keepdim=True)
    scaled = ((x.clamp(low, high) - low) / (high - low) * 255.0).round()
    marked = torch.where(finite, scaled, torch.tensor(_NONFINITE, dtype=scaled.dtype)).to(torch.uint8)
    factor = max(1, -(-min_cell // longest))
    enlarged: Pixels = marked.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2).numpy()
    return enlarged


def save_png(path: str | os.PathLike[str], array: Pixels) -> None:
    """Writes uint8 (H, W, 3) or (H, W) as PNG, atomically: readers see the old file or the whole new one.

    Makes the folder when it is missing. Raises OSError when the disk refuses.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as file:
        Image.fromarray(array).save(file, format="PNG")

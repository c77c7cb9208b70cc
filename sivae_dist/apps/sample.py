"""Samples of a trained model as a grid, as single pictures, or, for models of points, as numbers."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sivae_dist.apps.output import claim, write_aside
from sivae_dist.apps.sheet import sheet
from sivae_dist.apps.sources import described, image_range
from sivae_dist.engine.load import Noise, Trained
from sivae_dist.errors import UserError
from sivae_dist.evaluation.grids import Pixels, cells, save_png
from sivae_dist.progress import Bar

MOST_IN_A_GRID = 4096


def sample(
    trained: Trained,
    out: Path,
    *,
    n: int,
    seed: int = 0,
    psi: float | None = None,
    noise: Noise = "random",
    label: int | None = None,
    force: bool = False,
) -> str:
    """Writes samples 0 ... n - 1 of a seed to `out` and returns what was written.

    .png: one grid, row by row; a folder (no ending): one PNG a sample; .npy, .csv: (n, ...) numbers of any model.
    label: class of all samples; without it sample k of a conditional model has class k modulo their number.
    """
    if n < 1:
        raise UserError(f"--n is {n}, expected 1 or more", "64 makes a square")
    if out.suffix.lower() not in (".npy", ".csv"):
        image_range(trained)
    claim(out, force=force, suffixes=(".png", ".npy", ".csv"), folder=True)
    labels = class_labels(trained, n, label)
    if out.suffix:
        if out.suffix.lower() == ".png" and n > MOST_IN_A_GRID:
            raise UserError(f"a grid of {n} samples is too large", "give --out without an ending for single files")
        x = torch.cat([part.cpu() for part in _batches(trained, n, seed=seed, psi=psi, noise=noise, labels=labels)])
        if out.suffix.lower() == ".png":
            save_png(out, _grid(trained, x, seed, psi, noise, label))
        else:
            _write_numbers(out, x)
        return f"{n} samples of seed {seed}: {out}"
    digits, number = max(6, len(str(n - 1))), 0
    for part in _batches(trained, n, seed=seed, psi=psi, noise=noise, labels=labels):
        for pixels in cells(part, image_range(trained), min_cell=1):
            save_png(out / f"seed{seed}-{number:0{digits}d}.png", pixels)
            number += 1
    return f"{n} samples of seed {seed}: {out}/seed{seed}-*.png"


def sweep(
    trained: Trained,
    out: Path,
    psis: Sequence[float],
    *,
    n: int,
    seed: int = 0,
    noise: Noise = "random",
    force: bool = False,
) -> str:
    """Writes a grid with one sample a column and one truncation psi a row, and returns what was written."""
    image_range(trained)
    claim(out, force=force, suffixes=(".png",))
    if not 1 <= n * len(psis) <= MOST_IN_A_GRID:
        raise UserError(f"{n} samples at {len(psis)} values of psi make no grid", "8 samples are usual")
    z = trained.z(n, seed)
    rows = []
    for psi in Bar(psis, desc="sweep", disable=None, leave=False):
        x = trained.decode(z, truncation_psi=psi, noise=noise, seed=seed)
        rows.append(list(cells(x, image_range(trained))))
    title = f"Truncation, samples 0-{n - 1} of seed {seed}: {described(trained, noise=noise)}"
    save_png(out, sheet(rows, title=title, row_labels=[f"psi {psi:g}" for psi in psis]))
    return f"{n} samples of seed {seed} at {len(psis)} values of psi: {out}"


def class_labels(trained: Trained, n: int, label: int | None) -> Tensor | None:
    """(n,) classes: `label` for all, or 0, 1, 2, ... over and over; None for unconditional models. Raises UserError."""
    classes = trained.model.condition_dim
    if classes and label is None:
        return torch.arange(n) % classes
    trained.condition(label, 1)  # refuses what does not fit
    return None if label is None else torch.full((n,), label)


def _batches(
    trained: Trained, n: int, *, seed: int, psi: float | None, noise: Noise, labels: Tensor | None
) -> Iterator[Tensor]:
    with Bar(total=n, desc="samples", unit="img", disable=None, leave=False) as progress:
        for first in range(0, n, trained.batch):
            count = min(trained.batch, n - first)
            condition = None if labels is None else trained.condition(labels[first : first + count], count)
            yield trained.sample(count, seed, condition, truncation_psi=psi, noise=noise, first=first)
            progress.update(count)


def _grid(trained: Trained, x: Tensor, seed: int, psi: float | None, noise: Noise, label: int | None) -> Pixels:
    pictures, columns = list(cells(x, image_range(trained))), max(math.ceil(math.sqrt(len(x))), min(len(x), 8))
    classes = trained.model.condition_dim
    which = "" if not classes else f"class {label}" if label is not None else f"classes 0-{classes - 1} in turn"
    title = f"Samples 0-{len(x) - 1} of seed {seed}: {described(trained, psi=psi, noise=noise, label=which)}"
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    return sheet(rows, title=title)


def _write_numbers(out: Path, x: Tensor) -> None:
    values = x.numpy()
    if out.suffix.lower() == ".npy":
        write_aside(out, lambda aside: np.save(aside, values, allow_pickle=False))
        return
    text = io.StringIO()
    np.savetxt(text, values.reshape(len(values), -1), delimiter=",", fmt="%.9g")
    write_aside(out, lambda aside: aside.write_text(text.getvalue()))

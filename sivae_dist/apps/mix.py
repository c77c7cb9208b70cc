"""A matrix of mixed styles: every row's source with some layers of every column's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from sivae_dist.apps.output import claim
from sivae_dist.apps.sheet import sheet
from sivae_dist.apps.sources import code_of, described, image_range, name_of
from sivae_dist.engine.load import Noise, Trained
from sivae_dist.errors import UserError
from sivae_dist.evaluation.grids import Pixels, cells, save_png
from sivae_dist.progress import Bar

NAMES = ("coarse", "middle", "fine")
MOST = 32  # sources a side


def mix(
    trained: Trained,
    rows: Sequence[str],
    columns: Sequence[str],
    out: Path,
    *,
    layers: str = "coarse",
    psi: float | None = None,
    noise: Noise = "fixed",
    force: bool = False,
) -> str:
    """Writes the matrix to `out` (.png) and returns what was written. Sources are seeds and picture files.

    layers: those that come from the column, see `layer_numbers`; the others come from the row.
    """
    resolutions = trained.style_resolutions()
    numbers = layer_numbers(layers, resolutions)
    for name, sources in (("rows", rows), ("columns", columns)):
        if not 1 <= len(sources) <= MOST:
            raise UserError(f"--{name} has {len(sources)} sources, expected 1 to {MOST}", "give seeds or picture files")
    input_range = image_range(trained)
    claim(out, force=force, suffixes=(".png",))
    codes = torch.cat([code_of(source, trained)[0] for source in (*rows, *columns)])
    styles = trained.styles(codes, truncation_psi=psi)
    own = list(cells(trained.synthesise(styles, noise=noise), input_range))
    of_rows, of_columns = styles[: len(rows)], styles[len(rows) :]
    chosen = torch.zeros(styles.shape[1], dtype=torch.bool, device=styles.device)
    chosen[list(numbers)] = True
    matrix: list[list[Pixels | None]] = [[None, *own[len(rows) :]]]
    for i in Bar(range(len(rows)), desc="rows", disable=None, leave=False):
        mixed = torch.where(chosen[None, :, None], of_columns, of_rows[i : i + 1])
        matrix.append([own[i], *cells(trained.synthesise(mixed, noise=noise), input_range)])
    places = f"{resolutions[numbers[0]]}" + (
        f" to {resolutions[numbers[-1]]}" if resolutions[numbers[0]] != resolutions[numbers[-1]] else ""
    )
    span = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
    title = (
        f"Layers {span} ({places} px) from the column, all others of 0-{len(resolutions) - 1} from the row: "
        f"{described(trained, psi=psi, noise=noise)}"
    )
    row_labels = ["", *map(name_of, rows)]
    save_png(
        out,
        sheet(matrix, title=title, row_labels=row_labels, column_labels=["", *map(name_of, columns)], split_first=True),
    )
    return f"{len(rows)} x {len(columns)} mixtures, layers {span} of the columns: {out}"


def layer_numbers(text: str, resolutions: Sequence[int]) -> range:
    """Layers of a range a-b (both included), of one number, or of coarse, middle or fine.

    resolutions: pixels a side of each layer. coarse and middle are two resolutions each, fine is the rest: 4 and 8, 16
    and 32, 64 and more pixels, as Karras, Laine and Aila 2019 have it. Models of fewer than five resolutions have one
    resolution in coarse and middle instead. Raises UserError.
    """
    last = len(resolutions) - 1
    if text in NAMES:
        distinct = sorted(set(resolutions))
        each = 2 if len(distinct) >= 5 else 1
        of_name = {"coarse": distinct[:each], "middle": distinct[each : 2 * each], "fine": distinct[2 * each :]}[text]
        found = [i for i, side in enumerate(resolutions) if side in of_name]
        if not found:
            what = f"--layers {text}: the model stops at {distinct[-1]} px, which leaves none"
            raise UserError(what, f"give numbers, 0-{last} are all layers")
        return range(found[0], found[-1] + 1)
    match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
    if match is None:
        raise UserError(
            f"--layers {text!r} is no choice of layers", f"coarse, middle, fine, or numbers such as 0-{last}"
        )
    first = int(match[1])
    end = int(match[2] or match[1])
    if not first <= end <= last:
        raise UserError(f"--layers {text}: expected numbers from 0 to {last}, the lower one first", f"0-{last} are all")
    return range(first, end + 1)

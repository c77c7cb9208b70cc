"""What `sivae-dist compare` shows: tables in Markdown, the same for programs, and a sheet of all newest grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from sivae_dist.apps.compare import Figure, Group, Row, Table, differences
from sivae_dist.apps.sheet import sheet
from sivae_dist.engine.run_folder import RunFolder
from sivae_dist.errors import UserError
from sivae_dist.evaluation.grids import Pixels

WIDTH = 1568  # pixels of a grid on the sheet at most: 16 columns of 96
_DIGITS = {"psnr": 2, "psnr_mean_image": 2}  # decimals; others have four
_SHOWN = 60  # characters of a setting's value


def text(groups: Sequence[Group], tables: Sequence[Table]) -> str:
    """Who is compared, in what they differ, and a table for every mark."""
    parts = [_members(groups)]
    different = differences(groups)
    if different:
        head = ["setting", *(group.label for group in groups)]
        rows = [[key, *(_value(value) for value in values)] for key, values in different.items()]
        parts.append("They differ in:\n\n" + markdown(head, rows))
    data = {run.data for group in groups for run in group.runs if run.data}
    if len(data) > 1:
        parts.append("WARNING: these runs did not see the same data, so their metrics do not compare.")
    grows = any(run.config.progressive.enabled for group in groups for run in group.runs)
    for table in tables:
        title = (
            f"After {table.mark}" if table.kind == "images" else f"The last evaluation within {table.mark} of training"
        )
        parts.append(f"{title}:\n\n{_table(table, grows=grows)}")
        if not alike(table):
            sizes = ", ".join(f"{row.group} {_pixels(row)} px" for row in table.rows)
            parts.append(
                f"WARNING: these runs were evaluated at different resolutions there ({sizes}), so their metrics do not "
                "compare."
            )
    parts.append("Mean over the seeds +- standard deviation (n - 1) where there are several.")
    return "\n\n".join(parts)


def _members(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        encoder, decoder = (group.runs[0].parameters[player] for player in ("encoder", "decoder"))
        seeds = " ".join(str(run.config.train.seed) for run in group.runs)
        rows.append([group.label, group.runs[0].config.model.name, seeds, f"{encoder:,}", f"{decoder:,}"])
    return markdown(["run", "architecture", "seeds", "parameters of the encoder", "of the decoder"], rows)


def alike(table: Table) -> bool:
    """Whether all runs were evaluated at one resolution there. A network that grows begins with few pixels."""
    return len({size for row in table.rows for size in row.resolutions}) <= 1


def _pixels(row: Row) -> str:
    return " ".join(map(str, row.resolutions))


def _table(table: Table, *, grows: bool) -> str:
    metrics = list(dict.fromkeys(metric for row in table.rows for metric in row.figures))
    rows = []
    for row in table.rows:
        cells = [row.group, f"{row.kimg:.4g}", *(_seconds(row.seconds.get(timer)) for timer in ("train", "cpu"))]
        cells += [_pixels(row)] * grows
        rows.append([*cells, *(_figure(metric, row.figures.get(metric)) for metric in metrics)])
    return markdown(["run", "kimg", "seconds", "CPU seconds", *["pixels"] * grows, *metrics], rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown whose columns are also aligned in a terminal."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in [head, *rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    shown = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    shown.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(shown)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _figure(metric: str, value: Figure | None) -> str:
    if value is None:
        return "-"
    digits = _DIGITS.get(metric, 4)
    spread = "" if value.spread is None else f" +- {value.spread:.{digits}f}"
    return f"{value.mean:.{digits}f}{spread}"


def _value(value: Any) -> str:
    shown = "-" if value is None else str(value)
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."


def plain(groups: Sequence[Group], tables: Sequence[Table]) -> dict[str, Any]:
    """For programs. Values that are not finite are None."""
    members = [
        {
            "label": group.label,
            "architecture": group.runs[0].config.model.name,
            "parameters": group.runs[0].parameters,
            "runs": [{"path": str(run.path), "seed": run.config.train.seed, "data": run.data} for run in group.runs],
        }
        for group in groups
    ]
    found: dict[str, Any] = _finite(
        {"groups": members, "differences": differences(groups), "tables": [asdict(table) for table in tables]}
    )
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def contact_sheet(groups: Sequence[Group]) -> Pixels | None:
    """Every run's newest grid (real | reconstruction | sample) under its name; None where no run has drawn any."""
    blocks: list[Pixels] = []
    for group in groups:
        for run in group.runs:
            newest = _newest(run.path)
            if newest is not None:
                kimg = int(newest.stem.removeprefix("nimg-")) / 1000
                blocks.append(sheet([[_opened(newest)]], title=f"{run.name} ({group.label}), {kimg:g} kimg"))
    if not blocks:
        return None
    width = max(block.shape[1] for block in blocks)
    padded = [np.pad(b, ((0, 0), (0, width - b.shape[1]), (0, 0)), constant_values=255) for b in blocks]
    return np.concatenate(padded)


def _newest(run: Path) -> Path | None:
    found = [p for p in RunFolder(run).samples.glob("nimg-*.png") if p.stem.removeprefix("nimg-").isdecimal()]
    return max(found, key=lambda path: int(path.stem.removeprefix("nimg-")), default=None)


def _opened(path: Path) -> Pixels:
    """A grid, not wider than WIDTH."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            picture = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the picture {path}: {error}"[:500], "remove it, or draw it again") from error
    if picture.width > WIDTH:
        picture = picture.resize((WIDTH, max(1, round(picture.height * WIDTH / picture.width))), Image.Resampling.BOX)
    return np.asarray(picture)

"""`sivae-dist memory`: which cases to predict, and the table of what they take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sivae_dist.engine.config import RunConfig, from_dict, read_yaml
from sivae_dist.engine.precision import Dtype
from sivae_dist.engine.predict_memory import Case, Prediction, predict
from sivae_dist.errors import UserError
from sivae_dist.resources import configs_dir

OVERVIEW = "ffhq1024_*.yaml"  # one recipe an architecture: its network at full width
OVERVIEW_RESOLUTIONS = (256, 512, 1024)
OVERVIEW_DTYPES: tuple[Dtype, ...] = ("fp32", "bf16")
OVERVIEW_RECOMPUTE = (None, 0)


@dataclass(frozen=True)
class Row:
    """A case in a table. images: of one process in an iteration; micro_batches: passes that they are split into."""

    architecture: str
    resolution: int
    precision: str
    recompute_from: int | None
    images: int
    micro_batches: int
    processes: int
    bytes: Prediction


@dataclass(frozen=True)
class Wish:
    """What the command line asks for; empty: what the config says, or the overview's own."""

    resolutions: Sequence[int] = ()
    dtypes: Sequence[Dtype] = ()
    recompute_from: Sequence[int | None] = ()
    batch: int | None = None
    processes: int = 1


def rows(path: Path | None, wish: Wish) -> Iterator[Row]:
    """Every wished-for case of a config, or of all architectures. Raises UserError for one that cannot be."""
    if path is not None:
        yield from _of(from_dict(read_yaml(path), str(path)), wish)
        return
    for recipe in sorted(configs_dir().glob(OVERVIEW)):
        config = from_dict(read_yaml(recipe), str(recipe))
        plain = replace(
            config,
            train=replace(config.train, accumulation=1),
            progressive=replace(config.progressive, enabled=False),
        )
        yield from _of(
            plain,
            replace(
                wish,
                resolutions=wish.resolutions or OVERVIEW_RESOLUTIONS,
                dtypes=wish.dtypes or OVERVIEW_DTYPES,
                recompute_from=wish.recompute_from or OVERVIEW_RECOMPUTE,
                batch=wish.batch or 1,
            ),
        )


def _of(config: RunConfig, wish: Wish) -> Iterator[Row]:
    for model, level, size in _networks(config, wish.resolutions):
        for dtype in wish.dtypes or (config.precision.resolved(),):
            for pixels in wish.recompute_from or (config.train.recompute_from,):
                train = replace(config.train, recompute_from=pixels)
                images = wish.batch or -(-size // wish.processes)
                case = Case(replace(config, model=model, train=train), images, dtype, level, wish.processes)
                told = predict(case)
                splits = min(train.accumulation, images)
                yield Row(model.name, told.resolution, dtype, pixels, images, splits, wish.processes, told)


def _networks(config: RunConfig, resolutions: Sequence[int]) -> Iterator[tuple[Any, int | None, int]]:
    """(model, level, images over all processes) for each resolution: of a growing network its levels."""
    growth, model, finest = config.progressive, config.model, getattr(config.model, "image_size", 0)
    if growth.enabled:
        levels = finest.bit_length() - 2
        sizes = {4 << level: level for level in range(levels)}
        for resolution in resolutions or sizes:
            if resolution not in sizes:
                raise UserError(
                    f"the network grows from 4 to {finest} pixels, {resolution} is no level of it",
                    f"use {', '.join(map(str, sizes))}",
                )
            level = sizes[resolution]
            yield model, level, growth.batch[min(level, len(growth.batch) - 1)]
        return
    for resolution in resolutions or (finest,):
        same = resolution == finest
        yield model if same else model.at_resolution(resolution), None, config.train.batch


def table(found: Sequence[Row]) -> str:
    """Aligned text, sizes in GiB."""
    phases = list(dict.fromkeys(name for row in found for name in row.bytes.phases if name not in {"images", "steps"}))
    head = [
        "architecture",
        "pixels",
        "precision",
        "recompute",
        "images",
        "weights",
        "gradients",
        "optimizer",
        "average",
        "data",
    ]
    lines = [[*head, *(f"in {name}" for name in phases), "total"]]
    for row in found:
        b = row.bytes
        images = str(row.images) if row.micro_batches == 1 else f"{row.images} in {row.micro_batches}"
        again = {None: "none", 0: "all"}.get(row.recompute_from, f"from {row.recompute_from}")
        held = [b.weights, b.gradients, b.optimizer, b.average, b.data]
        sizes = [*held, *(b.phases.get(name) for name in phases), b.total]
        resolution = str(row.resolution) if row.resolution else "-"
        lines.append(
            [row.architecture, resolution, row.precision, again, images]
            + ["-" if size is None else f"{size / (1 << 30):.2f}" for size in sizes]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(w) if i < 4 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join(text)


def plain(row: Row) -> dict[str, Any]:
    """For programs: all sizes in bytes."""
    return {**asdict(row), "bytes": {**asdict(row.bytes), "activations": row.bytes.activations}}

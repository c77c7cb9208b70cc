"""`sivae-dist memory [CONFIG]`."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from sivae_dist.errors import UserError

NOTE = """\
GiB of one process. weights, gradients, optimizer, average (EMA); data: bytes of the next batch, at the data's own
resolution; "in PHASE": what else is alive at the peak of that phase (activations, images); total: the highest peak. Not
included: workspaces of convolutions, slack of the memory allocator, the device's own context. recompute:
train.recompute_from."""


def memory(
    config: Path | None = None,
    /,
    *,
    resolutions: tuple[int, ...] = (),
    precision: tuple[Literal["fp32", "bf16", "fp16"], ...] = (),
    batch: int | None = None,
    recompute_from: tuple[str, ...] = (),
    processes: int = 1,
    json: bool = False,
) -> None:
    """Tell what memory a training run will need, without needing it: no data, no device, nothing allocated.

    Args:
        config: YAML file of a run. Without it: every architecture at full width, one image at a time.
        resolutions: Pixels a side, instead of the config's: levels of a network that grows, else networks of the same
            family.
        precision: Number formats, instead of the config's.
        batch: Images of one process in an iteration, instead of its part of the config's batch.
        recompute_from: Values for train.recompute_from to compare: none, 0 (all blocks), or pixels a side.
        processes: How many share the batch.
        json: Print one list for programs, in bytes.
    """
    from sivae_dist.apps import memory_table as app  # noqa: PLC0415 (keeps --help quick)

    if processes < 1 or (batch is not None and batch < 1) or any(size < 1 for size in resolutions):
        raise UserError(
            f"--processes {processes}, --batch {batch}, --resolutions {' '.join(map(str, resolutions))} are not all in "
            "range",
            "give positive numbers",
        )
    wish = app.Wish(resolutions, precision, [_pixels(value) for value in recompute_from], batch, processes)
    found = list(app.rows(config, wish))
    print(jsonlib.dumps([app.plain(row) for row in found], indent=1) if json else f"{app.table(found)}\n\n{NOTE}")


def _pixels(value: str) -> int | None:
    if value.lower() == "none":
        return None
    if not value.isdecimal() or len(value) > 9:
        raise UserError(
            f"--recompute-from is {value[:100]!r}, expected none or pixels a side", "for example: none 256 0"
        )
    return int(value)


COMMANDS: dict[str, Callable[..., None]] = {"memory": memory}

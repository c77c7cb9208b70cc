"""`sivae-dist checkpoint list | verify | prune`."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sivae_dist.apps.checkpoints import Entry


def list_(run: Path, /, *, json: bool = False) -> None:
    """List a run's checkpoints: images, size, metrics, which is the latest and the best, which is damaged.

    Only sizes are compared here; `verify` reads every byte.

    Args:
        run: A run folder.
        json: Print for programs.
    """
    from sivae_dist.apps import checkpoints as app  # noqa: PLC0415 (keeps --help quick)

    found = app.entries(run, thorough=False, tell=_note)
    if json:
        print(_plain(found))
        return
    for entry in found:
        state = "damaged" if entry.damage else "good"
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in entry.metrics.items())
        kimg, told = entry.nimg / 1000, ", ".join(entry.why)
        print(f"{entry.path.name}  {kimg:>10.3f} kimg  {_size(entry.bytes):>10}  {state:<7}  {told}  {metrics}")
        for text in entry.damage:
            print(f"    {text}")


def verify(path: Path, /, *, json: bool = False) -> None:
    """Read checkpoints whole: sizes, checksums, and whether a run could go on from them.

    Status 0: all are good. 1: at least one is damaged. 2: there is none.

    Args:
        path: A run folder, for all of its checkpoints, or one checkpoint.
        json: Print for programs.
    """
    from sivae_dist.apps import checkpoints as app  # noqa: PLC0415 (keeps --help quick)

    found = app.entries(path, thorough=True, tell=_note)
    if json:
        print(_plain(found))
    else:
        for entry in found:
            print(f"{entry.path}: {'; '.join(entry.damage) or f'good ({_size(entry.bytes)})'}")
    if any(entry.damage for entry in found):
        sys.exit(1)


def prune(
    run: Path,
    /,
    *,
    keep_last: int | None = None,
    keep_every_kimg: float | None = None,
    best: str | None = None,
    best_is: Literal["max", "min"] | None = None,
    damaged: bool = False,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Remove a run's checkpoints that its settings (or these options) do not keep. The latest good one always stays.

    Args:
        run: A run folder in which nothing is training.
        keep_last: How many of the newest stay.
        keep_every_kimg: Besides those, one every this many thousand images. 0: none for that reason.
        best: The best by this metric stays, too; "none": none for that reason.
        best_is: Which value of it is the better one.
        damaged: Remove those that are damaged, too.
        dry_run: Say what would go, and remove nothing.
        json: Print for programs.
    """
    from sivae_dist.apps import checkpoints as app  # noqa: PLC0415 (keeps --help quick)

    given: dict[str, Any] = {
        "keep_last": keep_last,
        "keep_every_kimg": keep_every_kimg,
        "best": best,
        "best_is": best_is,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    if best == "none":
        changes["best"] = None
    done = app.prune(run, app.retention(run, changes), damaged=damaged, dry_run=dry_run)
    if json:
        values = {
            "keeps": {path.name: why for path, why in done.keeps.items()},
            "removes": [path.name for path in done.removes],
            "damaged": [path.name for path in done.damaged],
            "bytes": done.bytes,
            "dry_run": dry_run,
        }
        print(jsonlib.dumps(values, indent=1))
        return
    for path, why in sorted(done.keeps.items()):
        print(f"keeps    {path.name}  ({why})")
    for path in done.removes:
        print(f"{'would remove' if dry_run else 'removed'}  {path.name}")
    for path in done.damaged:
        print(f"damaged  {path.name}  (--damaged removes it)")
    print(f"{_size(done.bytes)} {'would be' if dry_run else 'are'} free")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _plain(entries: list[Entry]) -> str:
    rows = [{**dataclasses.asdict(e), "path": str(e.path), "good": not e.damage} for e in entries]
    return jsonlib.dumps(rows, indent=1)


def _size(nbytes: int) -> str:
    value, units = float(nbytes), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.4g} {units[0]}"


COMMANDS: dict[str, Callable[..., None]] = {
    "checkpoint list": list_,
    "checkpoint verify": verify,
    "checkpoint prune": prune,
}

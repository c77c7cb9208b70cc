"""`sivae-dist compare RUN RUN ...`."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from sivae_dist.errors import UserError


def compare(
    runs: tuple[Path, ...],
    /,
    *,
    at: tuple[float, ...] = (),
    seconds: tuple[float, ...] = (),
    timer: Literal["train", "cpu"] = "train",
    time: bool = True,
    out: Path | None = None,
    force: bool = False,
    json: bool = False,
) -> None:
    """Compare runs at equally many images and at equal training time; those that differ in the seed only are averaged.

    Args:
        runs: Run folders.
        at: Thousand images at which to compare, instead of the most that all runs were evaluated at.
        seconds: Seconds of training at which to compare, instead of those of the run that trained least.
        timer: Which time is equal: train (seconds within iterations) or cpu (CPU seconds of the process in them, which
            counts on a machine that others use).
        time: Compare at equal time, too. --no-time for runs that do not tell theirs.
        out: Folder for the table (compare.md, compare.json) and a sheet of all runs' newest grids (samples.png).
        force: Write over what is there.
        json: Print for programs.
    """
    from sivae_dist.apps import compare as app  # noqa: PLC0415 (keeps --help quick)
    from sivae_dist.apps import compare_report as report  # noqa: PLC0415
    from sivae_dist.apps.output import claim  # noqa: PLC0415

    if not runs:
        raise UserError("no run is given", "for example: sivae-dist compare runs/a-seed0 runs/a-seed1 runs/b-seed0")
    if any(not value >= 0 for value in (*at, *seconds)):
        raise UserError(f"--at {at}, --seconds {seconds}: not all are 0 or more", "give thousand images, and seconds")
    if out is not None:
        claim(out, force=force, suffixes=(), folder=True)
    groups = app.grouped([app.read_run(run) for run in runs])
    tables = [app.at_images(groups, kimg) for kimg in (at or (None,))]
    if time:
        tables += [app.at_time(groups, timer, limit) for limit in (seconds or (None,))]
    shown, values = report.text(groups, tables), jsonlib.dumps(report.plain(groups, tables), indent=1)
    print(values if json else shown)
    if out is not None:
        _write(out, shown, values, report.contact_sheet(groups), quiet=json)


def _write(out: Path, shown: str, values: str, sheet: object, *, quiet: bool) -> None:
    import numpy as np  # noqa: PLC0415

    from sivae_dist.evaluation.grids import save_png  # noqa: PLC0415
    from sivae_dist.files import write_atomically  # noqa: PLC0415

    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "compare.md", shown + "\n")
    write_atomically(out / "compare.json", values + "\n")
    if isinstance(sheet, np.ndarray):
        save_png(out / "samples.png", sheet)
    if not quiet:
        print(f"\nwritten: {', '.join(sorted(str(path) for path in out.glob('*.*') if path.is_file()))}")


COMMANDS: dict[str, Callable[..., None]] = {"compare": compare}

"""`sivae-dist diff RUN RUN`."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Callable
from pathlib import Path

from sivae_dist.errors import UserError


def diff(one: Path, two: Path, /, *, tolerance: float = 1e-5, json: bool = False) -> None:
    """Find where two runs part: settings, code and libraries, data, noise, losses, gradients or weights.

    Status 0: they are the same, bit for bit, as far as both have come. 1: they are not. 2: they cannot be compared.

    Args:
        one: A run folder.
        two: Another one.
        tolerance: Values and norms that differ by no more than this share count as differing in rounding only.
        json: Print one object for programs.
    """
    from sivae_dist.apps import diff as app  # noqa: PLC0415 (keeps --help quick)
    from sivae_dist.apps import diff_report as report  # noqa: PLC0415

    if not 0 <= tolerance < 1:
        raise UserError(f"--tolerance is {tolerance}, expected 0 or more and below 1", "1e-5 is usual")
    found = app.diff(one, two, tolerance)
    print(jsonlib.dumps(report.plain(found), indent=1) if json else report.text(found))
    if found.verdict != "same":
        sys.exit(1)


COMMANDS: dict[str, Callable[..., None]] = {"diff": diff}

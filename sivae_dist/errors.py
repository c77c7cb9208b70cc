"""The one exception that means "you can mend this": caught at the command line and printed without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 2000  # characters of a message


class UserError(Exception):
    """A mistake in the user's input, configuration or machine.

    what: what is wrong, with the offending value and what was expected.
    fix:  what to do about it, one sentence.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        if len(what) > LONGEST:  # a value quoted from a damaged file may be of any length
            what = f"{what[:LONGEST]} ... ({len(what)} characters)"
        self.what, self.fix = what, fix
        super().__init__(f"{what}\n  fix: {fix}" if fix else what)


def nearest(name: str, valid: Iterable[str]) -> str:
    """The closing half of an "unknown name" message: the nearest valid name, or all of them when none is near."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"use one of: {', '.join(names) or '(none)'}"

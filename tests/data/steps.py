"""Processes that die at a chosen step of what they do on the disk, as by a kill (SIGKILL) at that very moment."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


def die_before(step: int, folder: Path, *, but: str = "?") -> None:
    """Makes this process (no child of it) die right before its step-th change of what lies in a folder.

    Changes: files opened to be written, renames, removals, new folders. Paths that contain `but` do not count.
    """
    left, me, inside = step, os.getpid(), str(folder)

    def count(event: str, args: tuple[object, ...]) -> None:
        nonlocal left
        opened = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (event not in CHANGES and not opened) or os.getpid() != me:
            return
        path, place = os.fsdecode(args[0]), args[-1]  # type: ignore[arg-type]
        relative = isinstance(place, int) and place >= 0 and not opened  # to an open folder, as when a tree is removed
        if relative or (inside in path and but not in path):
            left -= 1
            if not left:
                os.kill(me, signal.SIGKILL)

    sys.addaudithook(count)

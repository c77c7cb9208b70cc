"""Looking after processes that tests start."""

from __future__ import annotations

import os
import time
from pathlib import Path

_elder: set[int] = set()  # children of this process that earlier tests have left, as torch's compiler does


def children(pid: int | None = None) -> set[int]:
    """Of a process; of this one those that were not there when the test began."""
    mine = pid or os.getpid()
    found = {int(c) for c in Path(f"/proc/{mine}/task/{mine}/children").read_text().split()}
    return found if pid else found - _elder


def remember_elder() -> None:
    """At the beginning of a test."""
    _elder.clear()
    _elder.update(children())


def gone(pids, seconds=10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{p}").exists() and "Z" not in state(p) for p in pids):
            return True
        time.sleep(0.05)
    return False


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"

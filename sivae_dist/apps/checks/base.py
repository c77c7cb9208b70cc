"""The outcome of one look, and how a look that fails itself is told."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sivae_dist.errors import UserError

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """One thing looked at. remedy: one sentence, where something is off.

    ok: nothing to do. warning: runs, but slower or not everything. problem: a run will fail.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Check:
    """Nothing to do."""
    return Check(name, "ok", found)


def warning(name: str, found: str, remedy: str) -> Check:
    """Runs, but."""
    return Check(name, "warning", found, remedy)


def problem(name: str, found: str, remedy: str) -> Check:
    """Will fail."""
    return Check(name, "problem", found, remedy)


def guarded(name: str, look: Callable[[], list[Check]]) -> list[Check]:
    """The checks of `look`; if it breaks (that is what a doctor meets), a problem that says how."""
    try:
        return look()
    except UserError as error:
        return [problem(name, error.what, error.fix or "see the message")]
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        return [problem(name, f"{type(error).__name__}: {text}", "see the message; reinstall what it names")]


def command_output(*command: str, seconds: float = 30, text: str = "") -> str | None:
    """What a program prints (both streams); None when it is not there, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout + done.stderr if done.returncode == 0 else None


def within(seconds: float, look: Callable[[], list[Check]], name: str, hung: Check) -> list[Check]:
    """As `guarded`, but gives up on a look that hangs (its thread is left behind) and returns `hung`."""
    found: list[Check] = []
    thread = threading.Thread(target=lambda: found.extend(guarded(name, look)), daemon=True)
    thread.start()
    thread.join(seconds)
    return found if not thread.is_alive() else [hung]

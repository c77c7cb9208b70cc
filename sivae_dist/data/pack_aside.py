"""The folder .pack of a packing at work: one packer at a time has it, and it goes when the data set is complete."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sivae_dist.errors import UserError
from sivae_dist.files import try_lock

_LOCK = "lock"
_WAIT_S = 3.0  # workers of a killed packer hold the lock until they end, too
_POLL_S = 0.1


@contextmanager
def held(aside: Path) -> Iterator[None]:
    """Makes the folder where there is none, and holds its lock. Raises UserError where another packer has it."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        with _lock_file(aside) as file:
            # Whoever waited for a packer that then finished may hold the lock of a folder that is gone.
            if try_lock(file, f"packs into {aside.parent}") and _is_at(file, aside / _LOCK):
                yield
                return
        if time.monotonic() > deadline:
            raise UserError(f"another process is packing into {aside.parent}", "wait for it, or end it")
        time.sleep(_POLL_S)


def remove(aside: Path) -> None:
    """Removes the folder, the lock (which the caller holds) last: until then nobody else may use what is there."""
    for path in aside.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()
    (aside / _LOCK).unlink()
    with suppress(OSError):  # the next packer has already made its own lock here
        aside.rmdir()


def _lock_file(aside: Path) -> IO[str]:
    try:
        aside.mkdir(parents=True, exist_ok=True)
        return open(aside / _LOCK, "a", encoding="utf-8")
    except FileNotFoundError:  # another packer has just removed it
        return _lock_file(aside)
    except OSError as error:
        what = f"{aside.parent} cannot be made: {error.strerror}"
        raise UserError(what, "choose a writable destination") from None


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

"""The folder of builds among processes: who builds, who uses what, what is old and in nobody's way.

A build's lock file (`NAME.lock`) is locked by its builder, its library by everyone who has loaded it; the operating
system releases both when a process dies in whatever way. What is removed is old, and neither lock is taken.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sivae_dist.ops._toolchain import UnavailableError

LIBRARY = "kernels.so"
RECORD = "build.json"
KEPT, KEPT_IN_ALL = 4, 16  # builds of a device and a torch; of all
_NAME = re.compile(r"(?P<hidden>\.?)(?P<name>(?P<device>cpu|cuda|emulated)-[0-9a-f]{16})(?P<aside>\.\d+)?")
_HELD: dict[Path, IO[bytes]] = {}  # open as long as this process

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within, no other process of this machine builds the same. The lock of a dead process is no lock."""
    while True:
        with open(path, "w") as file:
            try:
                if not _try(file, fcntl.LOCK_EX):
                    log.info("waiting for another process that builds the kernels (%s)", path)
                    fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:  # a file system without locks
                raise UnavailableError(
                    f"{path} cannot be locked: {error.strerror}", "set SIVAE_KERNEL_CACHE to a folder on a local disk"
                ) from error
            if _is_at(file, path):  # else it was removed in the meantime, and the next process locks another file
                yield
                return


def hold(library: Path) -> bool:
    """Keeps a library from being removed while this process lives. Says whether it is still there."""
    if library in _HELD:
        return True
    try:
        file = open(library, "rb")  # noqa: SIM115 (open as long as the process)
    except OSError:
        return False
    with contextlib.suppress(OSError):  # without locks nobody removes anything either
        fcntl.flock(file, fcntl.LOCK_SH)
    if not _is_at(file, library):
        file.close()
        return False
    _HELD[library] = file
    with contextlib.suppress(OSError):  # a cache that can only be read
        os.utime(library.with_name(RECORD))  # its last use
    return True


def remove_old(root: Path, keep: str) -> list[str]:
    """Removes all builds but `keep` and those last used, KEPT of each device and torch, KEPT_IN_ALL. Says which.

    Also removes what killed builders have left. Builds in use and builds being made stay, whatever their age.
    """
    kept, removed = Counter[tuple[str, str]](), []
    for used, folder, group in sorted(_builds(root), reverse=True):
        if folder.name == keep or (kept[group] < KEPT and kept.total() < KEPT_IN_ALL):
            kept[group] += 1
        elif _remove(root, folder, folder.name):
            log.info("removed the kernels %s, last used at %.0f", folder, used)
            removed.append(folder.name)
    for path in root.glob(".*"):
        if (match := _NAME.fullmatch(path.name)) and match["aside"] and match["name"] != keep:
            _remove(root, path, match["name"])
    return removed


def _builds(root: Path) -> Iterator[tuple[float, Path, tuple[str, str]]]:
    """(last use, folder, (device, torch)) of every build."""
    for folder in root.iterdir():
        match = _NAME.fullmatch(folder.name)
        if match and not match["hidden"] and not match["aside"] and folder.is_dir():
            record = folder / RECORD
            try:
                yield record.stat().st_mtime, folder, (match["device"], str(json.loads(record.read_text())["torch"]))
            except (OSError, ValueError, KeyError, TypeError):  # damaged: of no use to anyone
                yield 0.0, folder, (match["device"], "")


def _remove(root: Path, folder: Path, name: str) -> bool:
    """Removes a folder of this name unless someone builds or uses it."""
    lock = root / f"{name}.lock"
    with contextlib.suppress(OSError), open(lock, "w") as building:
        if not _try(building, fcntl.LOCK_EX) or not _is_at(building, lock):
            return False
        with contextlib.ExitStack() as stack:
            if (folder / LIBRARY).exists():
                library = stack.enter_context(open(folder / LIBRARY, "rb"))
                if not _try(library, fcntl.LOCK_EX):
                    return False
            shutil.rmtree(folder)
        (root / f"{name}.failed").unlink(missing_ok=True)
        lock.unlink()  # whoever waits for it looks whether it is still there
        return True
    return False


def _try(file: IO[str] | IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: IO[str] | IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False

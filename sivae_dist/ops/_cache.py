"""The folder of builds among processes: who builds, who uses what, what is old and in nobody's way.

A build's lock file (`NAME.lock`) is locked by its builder, its library by everyone who has loaded it; the operating
system releases both when a process dies in whatever way. What is removed is old, and neither lock is taken.

Some network file systems keep locks within a node (Lustre with localflock, NFS with local_lock). So names of folders
under construction tell the host, builds note the hosts that used them, and what may be another host's goes by age.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sivae_dist.ops._toolchain import UnavailableError

LIBRARY = "kernels.so"
RECORD = "build.json"
KEPT, KEPT_IN_ALL = 4, 16  # builds of a device and a torch; of all
ABANDONED_S = 6 * 3600.0  # another host's folder under construction; building takes minutes
USED_S = 30 * 86400.0  # a build that another host has used; longer than jobs run
_USED = "used-"  # and a host: when it last used the build
_ASIDE = r"(?P<aside>(\.(?P<host>[\w-]+))?\.\w+)?"
_NAME = re.compile(r"(?P<hidden>\.?)(?P<name>(?P<device>cpu|cuda|emulated)-[0-9a-f]{16})" + _ASIDE)
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


@functools.cache
def host() -> str:
    """A name for those who see each other's locks in any case: all processes, in containers too, on one kernel."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return re.sub(r"[^\w-]", "-", socket.gethostname())


def aside(folder: Path) -> Path:
    """A new name beside a build's folder, to make it there."""
    return folder.parent / f".{folder.name}.{host()}.{secrets.token_hex(4)}"


def remove_abandoned(folder: Path) -> None:
    """Removes what killed builders of this folder have left beside it. The caller holds the build's lock."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        if _abandoned(left):
            shutil.rmtree(left, ignore_errors=True)


def mark(folder: Path) -> None:
    """Notes that this host uses a build."""
    (folder / f"{_USED}{host()}").touch()


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
    with contextlib.suppress(OSError):  # a cache that can only be read
        mark(library.parent)
        os.utime(library.with_name(RECORD))  # its last use
    if not _is_at(file, library):
        file.close()
        return False
    _HELD[library] = file
    return True


def remove_old(root: Path, keep: str) -> list[str]:
    """Removes all builds but `keep` and those last used, KEPT of each device and torch, KEPT_IN_ALL. Says which.

    Also removes what killed builders have left. Builds in use and builds being made stay, whatever their age; what
    another host has used or makes stays for USED_S or ABANDONED_S, since its locks may not be seen here.
    """
    kept, removed = Counter[tuple[str, str]](), []
    for used, folder, group in sorted(_builds(root), reverse=True):
        if folder.name == keep or (kept[group] < KEPT and kept.total() < KEPT_IN_ALL):
            kept[group] += 1
        elif time.time() - _used_elsewhere(folder) > USED_S and _remove(root, folder, folder.name):
            log.info("removed the kernels %s, last used at %.0f", folder, used)
            removed.append(folder.name)
    for path in root.glob(".*"):
        if (match := _NAME.fullmatch(path.name)) and match["aside"] and match["name"] != keep and _abandoned(path):
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


def _used_elsewhere(folder: Path) -> float:
    """When another host last used a build, for all that is known; 0 for never."""
    with contextlib.suppress(OSError):
        marks = {path.name.removeprefix(_USED): path.stat().st_mtime for path in folder.glob(f"{_USED}*")}
        # Without a mark of its own this host has not made it, or it is older than marks.
        unknown = [] if host() in marks else [(folder / RECORD).stat().st_mtime]
        return max([*(at for name, at in marks.items() if name != host()), *unknown], default=0.0)
    return 0.0


def _abandoned(path: Path) -> bool:
    """Whether nobody makes this folder any more, if nobody on this host does (its lock tells)."""
    match = _NAME.fullmatch(path.name)
    if match and match["host"] == host():
        return True
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime > ABANDONED_S
    return False


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

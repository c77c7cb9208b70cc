"""Files: paths as users write them, sizes in words, locks, and writing so that a file appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sivae_dist.errors import UserError

_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def expanded(path: str | Path) -> Path:
    """A path with ~ filled in. Raises UserError where nobody knows that home folder (as in some containers)."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        what = f"{str(path)!r:.200} names a home folder that is not known on this machine"
        raise UserError(what, "write the whole path instead of ~, or set HOME") from None


def sync(path: Path) -> None:
    """Forces a file, or the names in a folder, to the disk: they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path`, which is synced and takes its place at the end: readers see the old file or all of the new.

    Named after `path` alone, so that what a killed process left is written over the next time. One process at a time
    may write a path. After an error there is nothing new.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Writes a whole file, as `replacing` does; text as UTF-8."""
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: object) -> None:
    """As `write_atomically`, of indented JSON."""
    write_atomically(path, json.dumps(value, indent=2, default=str) + "\n")


def try_lock(file: IO[Any], others: str) -> bool:
    """Takes flock's lock of an open file, which the kernel gives back however the process ends; False if it is held.

    True also where the file system knows no locks: the user is told to see that no other process `others`.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
        print(f"this file system knows no locks: take care that no other process {others}", file=sys.stderr)
    return True


def size_of(count: float) -> str:
    """Bytes for people: 0.1 GB and more in GB, else in MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"

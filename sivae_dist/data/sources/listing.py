"""Listing folders: any number of files in order of name, without statting each and without a string kept for each.

Three million names of 45 bytes take 135 MB here; as sorted strings they would take three times that.
"""

from __future__ import annotations

import errno
import heapq
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from sivae_dist.errors import UserError

_RUN = 1 << 16  # names sorted at once
_TOLD_EVERY = 10_000
_LOST = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # of a link: to nothing, through a file, to itself

Tell = Callable[[int], object]


def entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder and is not hidden, in the order of the file system. Raises UserError."""
    try:
        with os.scandir(folder) as found:
            for entry in found:
                if not entry.name.startswith("."):
                    yield entry
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}", "check the path and the permissions") from None


class Kind(Enum):
    """What an entry is, or what the link leads to that it is. LOST: a link that leads to nothing."""

    FOLDER = "folder"
    FILE = "file"
    LOST = "lost"
    OTHER = "other"


def kind_of(entry: os.DirEntry[str]) -> Kind:
    """Follows links; only these are statted. Raises UserError where the system does not say what a link leads to."""
    link = False
    try:
        link = entry.is_symlink()
        if link:
            mode = os.stat(entry.path).st_mode
            folder, file = stat.S_ISDIR(mode), stat.S_ISREG(mode)
        else:
            folder, file = entry.is_dir(), entry.is_file()
    except OSError as error:
        if link and error.errno in _LOST:
            return Kind.LOST
        what = f"{entry.path} cannot be looked at: {error.strerror}"
        raise UserError(what, "see that what it leads to can be read, or remove it") from None
    return Kind.FOLDER if folder else Kind.FILE if file else Kind.OTHER


def listed(name: str, kind: Kind, wanted: Callable[[str], bool] | None = None) -> bool:
    """Whether an entry stands among the files: those wanted, and links that may have been one, or a folder of them."""
    fits = wanted is None or wanted(name)
    return (kind is Kind.FILE and fits) or (kind is Kind.LOST and (fits or not os.path.splitext(name)[1]))


@dataclass(frozen=True)
class Listing:
    """What lies in a folder. folders, files: names in order; lost: those of the files that are links to nothing."""

    folders: list[str]
    files: SortedNames
    lost: frozenset[str]


def visible(folder: Path, wanted: Callable[[str], bool] | None = None, tell: Tell | None = None) -> Listing:
    """The sub-folders and files that are not hidden, or links to such, of one reading of the folder.

    wanted: says which files to keep, by name; of links that lead to nothing those without an ending stay, too, as they
    may have led to a folder. tell: is told now and then how many files there are so far.
    """
    folders: list[str] = []
    lost: set[str] = set()

    def names() -> Iterator[str]:
        count = 0
        for entry in entries(folder):
            kind = kind_of(entry)
            if kind is Kind.FOLDER:
                folders.append(entry.name)
            elif listed(entry.name, kind, wanted):
                count += 1
                if tell is not None and count % _TOLD_EVERY == 0:
                    tell(count)
                if kind is Kind.LOST:
                    lost.add(entry.name)
                yield entry.name

    files = SortedNames(names())
    return Listing(sorted(folders), files, frozenset(lost))


def entered(folder: Path, above: tuple[str, ...]) -> tuple[str, ...] | None:
    """`above`, the real paths of the folders on the way, and that of `folder`; None where it is one of them.

    Such a link goes back to a folder that it lies in: what is there was found already. Raises UserError for a link to a
    folder around those, which would take in what does not belong to the data set.
    """
    real = os.path.realpath(folder)
    if real in above:
        return None
    if inside := next((path for path in above if path.startswith(f"{real.rstrip(os.sep)}{os.sep}")), None):
        raise UserError(f"{folder} is a link to {real}, which holds {inside} itself", "remove the link")
    return (*above, real)


class SortedNames:
    """File names in order, packed into bytes; may be gone through any number of times. endings: their extensions."""

    def __init__(self, names: Iterable[str]) -> None:
        self._runs: list[bytes] = []
        self.endings: set[str] = set()
        batch: list[str] = []
        for name in names:
            self.endings.add(os.path.splitext(name)[1])
            batch.append(name)
            if len(batch) == _RUN:
                self._add(batch)
        self._add(batch)

    def _add(self, batch: list[str]) -> None:
        batch.sort()
        self._runs.append(os.fsencode("".join(f"{name}\0" for name in batch)))
        batch.clear()

    def __iter__(self) -> Iterator[str]:
        return heapq.merge(*map(_unpacked, self._runs))


def _unpacked(run: bytes) -> Iterator[str]:
    begin = 0
    while begin < len(run):
        end = run.index(0, begin)
        yield os.fsdecode(run[begin:end])
        begin = end + 1

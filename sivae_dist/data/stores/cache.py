"""Blocks of remote shards on this machine's disk, shared by its ranks, workers and runs.

A block is BLOCK bytes of a tar (or a whole index), named by the sha256 of its file in the manifest: the same data have
the same blocks wherever they come from, and other data never do. Blocks are written aside and renamed, so that a
process killed in between leaves nothing half done; each is checked by its CRC-32 when a process first opens it, and
again when another file lies in its place or this one has changed; what the readers find damaged in spite of that is
dropped. The least recently used go first, by the time of last access: that of the last change stays as it was written.
Locks are flock's, which the kernel gives back however a process ends; nobody waits for one longer than it would take to
do without.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import resource
import struct
import threading
import time
import uuid
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sivae_dist.data.stores.base import Events
from sivae_dist.errors import UserError

# A lane reads windows of 256 samples one after the other: some 10 to 25 MB at 256 px. Whole shards (256 MB) would mean
# 32 GB before the first batch of 128 lanes, single samples a request for each picture.
BLOCK = 8 << 20
_LEAST_BLOCK = 1 << 16
_BLOCKS_AT_LEAST = 16  # in a cache; a small one has smaller blocks
_HEAD = struct.Struct("<8sIQ")  # magic, CRC-32 of the rest, bytes of the rest
_MAGIC = b"SIVAEBLK"
# Open files of all caches of a process together: a quarter of what it may have open, so that connections, shards of
# this machine and the caches of a pattern's other folders find room. To open a block again is a matter of microseconds.
_OPEN_MOST, _OPEN_LEAST = 1024, 4
_IDLE_S = 60.0  # an open file that was evicted keeps its space on the disk: what is not read is closed
# Blocks that are remembered as checked, about 0.5 kB each: those of 128 GiB, or 16 for each of 1024 lanes.
_CHECKED_MOST = 1 << 14
_TOUCH_S = 10.0
_STRIPES = 256
_POLL_S = 0.02
_EVICT_WAIT_S = 10.0
_ABANDONED_S = 3600.0  # a file being written for so long is of a process that has died
_REFUSED_S = 60.0  # after a write that failed, this long none is tried
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class _Checked:
    """A block that was whole. file: which one, as `_file` says; touched: when its last use was written down."""

    file: tuple[int, int, int, int]
    length: int
    touched: float


@dataclass
class _Open:
    handle: int
    block: _Checked
    used: float


_CACHES: weakref.WeakSet[BlockCache] = weakref.WeakSet()


class BlockCache:
    """A folder of blocks of at most `limit` bytes together. A cache that fails is one that holds nothing.

    Checksums find damage, not malice, and cleaning up deletes files: a folder of somebody else's, or one that everybody
    may write to, is a UserError when it is first used.
    events: gets `cache_refused` (blocks that could not be kept), `cache_damaged`, `cache_evicted`, and one note.
    """

    def __init__(self, folder: Path, limit: int, events: Events) -> None:
        self.folder, self.limit, self.events = folder, limit, events
        self.block = BLOCK
        while self.block > _LEAST_BLOCK and self.block * _BLOCKS_AT_LEAST > limit:
            self.block //= 2
        self._step = max(1, limit // self.block // 16)  # blocks written by all processes between two clean-ups
        self._opened: OrderedDict[str, _Open] = OrderedDict()
        self._checked: OrderedDict[str, _Checked] = OrderedDict()
        self._refused_until = 0.0
        self._told = self._looked = self._trusted = False
        self._lock = threading.RLock()  # of what is open: several threads may fetch
        _CACHES.add(self)

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes | None:
        """Bytes of a block, None when it is not there."""
        self._trust()
        with self._lock:
            found = self._open(key)
            if found is None:
                return None
            length = found.block.length - offset if length is None else length
            try:
                data = os.pread(found.handle, length, _HEAD.size + offset)
            except OSError:
                data = b""
            if len(data) != length:
                self.drop(key)
                return None
            return data

    def has(self, key: str) -> bool:
        """Whether a block seems to be there; `read` knows better."""
        return key in self._opened or self._path(key).exists()

    def accepts(self) -> bool:
        """Whether blocks can be kept, as far as is known."""
        return time.monotonic() >= self._refused_until

    def put(self, key: str, data: bytes) -> bool:
        """Keeps a block. Returns whether it did."""
        if not self.accepts():
            self.events.count("cache_refused")
            return False
        try:
            self._make_room()
            try:
                self._write(key, data)
            except OSError as error:
                if error.errno not in _NO_ROOM or not self._evict(self.limit // 2):
                    raise
                self._write(key, data)  # the disk is full of other things: be content with half
        except OSError as error:
            self._refused_until = time.monotonic() + _REFUSED_S
            self.events.count("cache_refused")
            if not self._told:
                self._told = True
                why = error.strerror or type(error).__name__
                self.events.notes.append(f"cannot write the data cache {self.folder} ({why}): reading without it")
            return False
        return True

    def drop(self, key: str) -> None:
        """Forgets a block."""
        with self._lock:
            self._checked.pop(key, None)
            if found := self._opened.pop(key, None):
                os.close(found.handle)
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def held(self) -> int:
        """Bytes of all blocks that are there."""
        return sum(size for _, size, _ in self._files())

    def close(self) -> None:
        """Closes files; the cache may be used again afterwards."""
        with self._lock:
            while self._opened:
                os.close(self._opened.popitem()[1].handle)

    @contextlib.contextmanager
    def lock(self, key: str, until: float) -> Iterator[None]:
        """Within, no other process fetches this block. After `until` (time.monotonic) it goes on without that."""
        handle = None
        try:
            self._make_folder()
            folder = self.folder / "locks"
            folder.mkdir(exist_ok=True, mode=0o700)
            handle = os.open(folder / f"{zlib.crc32(key.encode()) % _STRIPES:02x}", os.O_RDWR | os.O_CREAT, 0o600)
            _flock(handle, until)
        except OSError:  # a full or read-only disk, or one without locks: two may then fetch the same
            pass
        try:
            yield
        finally:
            if handle is not None:
                os.close(handle)

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._trust()

    def _trust(self) -> None:
        """Raises UserError where others may put files into the folder, or links in the place of those written here."""
        self._trusted = self._trusted or refuse_shared(self.folder)

    def _path(self, key: str) -> Path:
        return self.folder / "blocks" / key[:2] / key

    def _open(self, key: str) -> _Open | None:
        now = time.monotonic()
        if found := self._opened.get(key):
            self._opened.move_to_end(key)
            found.used = now
            if now - found.block.touched > _TOUCH_S and not _touched(found, now):  # evicted: it would keep its space
                os.close(self._opened.pop(key).handle)
                return None
            return found
        handle = self._handle(key)
        if handle is None:
            return None
        block = self._whole(key, handle)
        if block is None:
            os.close(handle)
            self.events.count("cache_damaged")
            self.drop(key)
            return None
        found = self._opened[key] = _Open(handle, block, now)
        if now - block.touched > _TOUCH_S:
            _touched(found, now)
        return found

    def _handle(self, key: str) -> int | None:
        """A block's file, opened; None when it is not there. Makes room for it among the open ones."""
        now, most = time.monotonic(), max(_OPEN_LEAST, _may_be_open() // len(_CACHES))
        while self._opened and (len(self._opened) >= most or now - next(iter(self._opened.values())).used > _IDLE_S):
            os.close(self._opened.popitem(last=False)[1].handle)
        while True:
            try:
                return os.open(self._path(key), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            except OSError as error:
                if error.errno != errno.EMFILE or not self._opened:  # others may have more open than was thought
                    return None
                os.close(self._opened.popitem(last=False)[1].handle)

    def _whole(self, key: str, handle: int) -> _Checked | None:
        """The block in an open file, which is read to the end unless this process has done so; None if not whole."""
        try:
            file = _file(handle)
        except OSError:
            return None
        if (known := self._checked.get(key)) is not None and known.file == file:
            self._checked.move_to_end(key)
            return known
        length = _checked_length(handle)
        if length is None:
            return None
        while len(self._checked) >= _CHECKED_MOST:
            self._checked.popitem(last=False)
        known = self._checked[key] = _Checked(file, length, -math.inf)
        return known

    def _write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            with open(aside, "xb") as file:
                file.write(_HEAD.pack(_MAGIC, zlib.crc32(data), len(data)))
                file.write(data)
            os.replace(aside, path)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise

    def _make_room(self) -> None:
        """Counts a write of any process by a byte appended to one file; every `step` of them someone cleans up."""
        self._make_folder()
        handle = os.open(self.folder / "written", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, b".")
            written = os.fstat(handle).st_size
        finally:
            os.close(handle)
        if written >= self._step or not self._looked:
            self._looked = True
            self._evict(self.limit - 2 * self._step * self.block)

    def _evict(self, target: int) -> int:
        """Removes the least recently used blocks until all take at most `target` bytes. Returns the bytes removed."""
        handle = os.open(self.folder / "evict.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _flock(handle, time.monotonic() + _EVICT_WAIT_S)
            files = sorted(self._files())
            surplus = before = sum(size for _, size, _ in files) - max(0, target)
            for _, size, path in files:
                if surplus <= 0:
                    break
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    surplus -= size
                    self.events.count("cache_evicted")
            with contextlib.suppress(OSError):
                os.truncate(self.folder / "written", 0)
            return before - surplus
        finally:
            os.close(handle)

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """(last use, bytes, path) of all blocks. Removes what killed processes have left."""
        for folder in _scan(self.folder / "blocks"):
            for entry in _scan(folder.path):
                try:
                    facts = entry.stat(follow_symlinks=False)
                    if entry.name.endswith(".tmp"):
                        if time.time() - facts.st_mtime > _ABANDONED_S:
                            os.unlink(entry.path)
                        continue
                except OSError:
                    continue
                yield max(facts.st_atime, facts.st_mtime), facts.st_size, entry.path


def refuse_shared(folder: Path) -> bool:
    """Raises UserError where others may write into a folder. Returns whether it is there at all."""
    try:
        facts = os.stat(folder)
    except OSError:  # not there yet
        return False
    if facts.st_uid != os.geteuid():
        what = f"the data cache {folder} belongs to another user ({facts.st_uid}, this one is {os.geteuid()})"
        raise UserError(what, "set data.cache_dir to a folder of your own; one that is not there yet is made")
    if facts.st_mode & 0o002:
        what = f"everybody may write to the data cache {folder}, and so decide what is trained on"
        raise UserError(what, f"chmod o-w {folder}, or set data.cache_dir to a folder in it, which is then made")
    return True


def _may_be_open() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _OPEN_MOST if soft == resource.RLIM_INFINITY else min(_OPEN_MOST, soft // 4)


def _file(handle: int) -> tuple[int, int, int, int]:
    """What tells an open file from others, and from itself after it was written to."""
    facts = os.fstat(handle)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _touched(found: _Open, now: float) -> bool:
    """Writes down that a block was used. Returns whether its file is still in the folder.

    The time of the file's last change stays: it tells whether it has changed.
    """
    found.block.touched = now
    facts = os.fstat(found.handle)
    with contextlib.suppress(OSError):
        os.utime(found.handle, ns=(time.time_ns(), facts.st_mtime_ns))
    return facts.st_nlink > 0


def _scan(folder: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _flock(handle: int, until: float) -> bool:
    """Takes a lock, or does not when it is not free until then. Raises OSError where there are no locks."""
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
        time.sleep(_POLL_S)


def _checked_length(handle: int) -> int | None:
    """Bytes of the block in an open file, None when it is not whole."""
    try:
        magic, crc, length = _HEAD.unpack(os.pread(handle, _HEAD.size, 0))
        if magic != _MAGIC or os.fstat(handle).st_size != _HEAD.size + length:
            return None
        found, offset = 0, _HEAD.size
        while part := os.pread(handle, 1 << 20, offset):
            found, offset = zlib.crc32(part, found), offset + len(part)
        return length if found == crc else None
    except (OSError, struct.error):
        return None

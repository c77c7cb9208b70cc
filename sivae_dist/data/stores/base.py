"""What every kind of storage gives the readers of shards, and the settings of those that lie elsewhere."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sivae_dist.data.manifest import FILE_NAME, MAX_MANIFEST_BYTES, Manifest
from sivae_dist.errors import UserError
from sivae_dist.files import expanded

REREADS = 3  # of a small file that seems to have been damaged on its way


@dataclass(frozen=True)
class Expected:
    """What the manifest says of a file. bytes is 0 where it does not say (an index)."""

    sha256: str
    bytes: int


def expected_files(manifest: Manifest) -> dict[str, Expected]:
    """What the manifest says of the files beside it."""
    found: dict[str, Expected] = {}
    for shard in manifest.shards:
        found[f"{shard.name}.tar"] = Expected(shard.sha256, shard.bytes)
        found[f"{shard.name}.index"] = Expected(shard.index_sha256, 0)
    return found


@dataclass
class Events:
    """What a store met since somebody looked: counts by name, and sentences a user should be told once."""

    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, name: str, number: int = 1) -> None:
        """Counts; several threads may."""
        with self._lock:
            self.counts[name] += number

    def take(self) -> Events:
        """All of it, and begins anew."""
        with self._lock:
            taken = Events(self.counts, self.notes)
            self.counts, self.notes = Counter(), []
        return taken


@dataclass(frozen=True)
class Access:
    """How remote files are read. limit_s bounds one read with all its attempts. cache_gb 0 means no cache."""

    connect_timeout_s: float = 10.0
    read_timeout_s: float = 60.0
    retries: int = 6
    limit_s: float = 225.0
    cache_dir: str = ""
    cache_gb: float = 16.0

    def cache_folder(self) -> Path:
        """data.cache_dir, or the user's cache folder."""
        if self.cache_dir:
            return expanded(self.cache_dir)
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return expanded(home) / "sivae-dist" / "data"


class Store(Protocol):
    """Read access to the files of one shard folder. Names are plain file names. Used by one thread of one process.

    url: where it is, for messages, without credentials. manifest_name: the file to begin with. All methods raise
    DataError for what is wrong with a file (missing, truncated) and StorageError when it cannot be had now.
    """

    url: str
    manifest_name: str

    @property
    def events(self) -> Events:
        """What it met since somebody looked."""
        ...

    def expect(self, files: Mapping[str, Expected]) -> None:
        """Tells what the manifest says of the files: what a cache knows them by, and what their size must be."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file; stores that are told what to expect need not look."""
        ...

    def read(self, name: str, offset: int, length: int) -> bytes:
        """A range of a file, shorter than `length` only at the file's end."""
        ...

    def whole(self, name: str, limit: int) -> bytes:
        """A small file, whole. One of more than `limit` bytes is a DataError, found out before it fills the memory."""
        ...

    def forget(self, name: str, offset: int, length: int) -> bool:
        """Is told that these bytes are damaged. Returns whether reading them again may give others."""
        ...

    def renew(self, name: str) -> None:
        """Is told that a file will be asked for again that was missing or another one: an open one is outdated."""
        ...

    def prepare(self, wanted: Sequence[tuple[str, int, int]]) -> None:
        """Is told ranges (name, offset, length; length 0: the whole of a small file) that will be read now.

        What takes long to get is got for all of them at once. Raises StorageError; what else fails fails in `read`.
        """
        ...

    def close(self) -> None:
        """Gives back file handles or connections; the store may be used again afterwards."""
        ...


class NoMemory:
    """The parts of a Store that keeps no copies and knows sizes by looking."""

    manifest_name = FILE_NAME

    def __init__(self) -> None:
        self.events = Events()

    def expect(self, files: Mapping[str, Expected]) -> None:
        """Nothing to remember."""

    def prepare(self, wanted: Sequence[tuple[str, int, int]]) -> None:
        """The kernel reads ahead by itself."""

    def forget(self, name: str, offset: int, length: int) -> bool:
        """No copy to throw away: the same bytes would be read again."""
        return False

    def renew(self, name: str) -> None:
        """Nothing is kept open."""


def read_manifest(store: Store) -> Manifest:
    """The checked manifest of a store. Raises UserError.

    What may have been damaged on the way is read again, as long as other bytes come: what is no manifest, what does not
    fit its checksum, or, of data packed before there was one, its fingerprint. The same bytes twice are what lies
    there.
    """
    name, before = store.manifest_name, b""
    where = f"{store.url}/{name}"
    for _ in range(REREADS):
        data = store.whole(name, MAX_MANIFEST_BYTES)
        with contextlib.suppress(UserError):
            manifest = Manifest.from_bytes(data, where)
            if manifest.recorded_fingerprint == manifest.fingerprint:
                return manifest
        if data == before or not store.forget(name, 0, 0):
            return Manifest.from_bytes(data, where)
        before = data
    return Manifest.from_bytes(store.whole(name, MAX_MANIFEST_BYTES), where)

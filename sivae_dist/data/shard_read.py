"""Reading samples of shards at random: lazily read indices, one ranged read per sample, every byte checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from sivae_dist.data import jpeg
from sivae_dist.data.again import BadShards
from sivae_dist.data.checksum import checksum
from sivae_dist.data.decode import decode_into
from sivae_dist.data.faults import DataError
from sivae_dist.data.manifest import (
    MAX_INDEX_BYTES,
    MAX_MEMBER_BYTES,
    Manifest,
    ShardInfo,
    is_key,
)
from sivae_dist.data.pyramid_file import read_pyramid, several
from sivae_dist.data.shard_write import BLOCK, INDEX_FORMAT, INDEX_VERSION
from sivae_dist.data.store import Store
from sivae_dist.data.stores.base import REREADS, NoMemory, expected_files, read_manifest
from sivae_dist.data.watch import INDEX
from sivae_dist.errors import UserError

_ROW = struct.Struct("<QIIq")  # MAX_MEMBER_BYTES and a CRC-32 have 32 bits
# Indices that are kept at least, of some 55 kB each at 1,024 samples a shard. Who serves many lanes says how many it
# needs (`Plan.shards_at_once`): two for each lane with windows of 256, so 120 MB in each worker of a rank with 1,024.
_INDICES_KEPT = 256
_REMEDY = "copy the shard again, or pack the data set again; `sivae-dist data verify` lists all damage"


@dataclass(frozen=True)
class Sample:
    """One decoded sample. image: (C, H, W) uint8, 0..255; label: class index or None."""

    key: str
    image: npt.NDArray[np.uint8]
    label: int | None


@dataclass(frozen=True)
class Index:
    """Where the images of one shard lie; small, as many are held.

    names: all keys, one after another; ends: where each of them ends; packed: a row a sample, quickly read.
    """

    names: str
    ends: array[int]
    packed: bytes

    @property
    def keys(self) -> list[str]:
        """The keys of all samples."""
        return [self.key(number) for number in range(len(self.ends))]

    def key(self, number: int) -> str:
        """The key of a sample."""
        return self.names[self.ends[number - 1] if number else 0 : self.ends[number]]

    def row(self, number: int) -> tuple[int, int, int, int]:
        """Offset, size, CRC-32 and label of a sample; label -1 for none."""
        return _ROW.unpack_from(self.packed, number * _ROW.size)

    def rows(self) -> list[tuple[int, int, int, int]]:
        """All of them."""
        return list(_ROW.iter_unpack(self.packed))


def load_manifest(store: Store) -> Manifest:
    """The checked manifest of a shard folder. Raises UserError; of a pyramid's root one that names its folders."""
    try:
        return read_manifest(store)
    except DataError as error:
        if error.reason == "missing":
            with contextlib.suppress(UserError):
                if listed := read_pyramid(store):
                    error = several(store.url, listed.resolutions)
        raise error from None


def load_index(store: Store, shard: ShardInfo, classes: int) -> Index:
    """The checked index of a shard. Raises DataError when it does not belong to the shard or is not believable."""
    name = f"{shard.name}.index"
    where = f"{store.url}/{name}"
    data = store.whole(name, MAX_INDEX_BYTES)
    for _ in range(REREADS):
        if hashlib.sha256(data).hexdigest() == shard.index_sha256 or not store.forget(name, 0, 0):
            break
        before, data = data, store.whole(name, MAX_INDEX_BYTES)
        if data == before:  # so that is what lies there
            break
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise DataError("index", f"{where} does not match the manifest: its sha256 differs", _REMEDY)
    lines = data.splitlines()
    try:
        head = json.loads(lines[0])
        rows = json.loads(b"[" + b",".join(lines[1:]) + b"]")
    except (ValueError, IndexError, RecursionError):
        raise DataError("index", f"{where} is no valid index", _REMEDY) from None
    if not isinstance(head, dict) or head.get("format") != INDEX_FORMAT:
        raise DataError("index", f"{where} is no valid index", _REMEDY)
    if head.get("version") != INDEX_VERSION:
        raise DataError(
            "index",
            f"{where} has format version {head.get('version')!r:.80}, this program reads version {INDEX_VERSION}",
            "update sivae-dist, or pack the data set again with this version",
        )
    if len(rows) != shard.count or head.get("bytes") != shard.bytes:
        raise DataError(
            "index",
            f"{where} lists {len(rows)} samples of a tar of {head.get('bytes')!r:.80} bytes; the manifest says "
            f"{shard.count} of {shard.bytes}",
            _REMEDY,
        )
    end = 0
    for row in rows:
        if problem := _row_problem(row, end, shard.bytes, classes):
            raise DataError("index", f"{where}: sample {row!r:.120}: {problem}", _REMEDY)
        end = row[1] + row[2]
    numbers = [(offset, size, crc32, -1 if label is None else label) for _, offset, size, crc32, label in rows]
    ends = array("I", accumulate(len(row[0]) for row in rows))  # a file of MAX_INDEX_BYTES needs no more bits
    return Index("".join(row[0] for row in rows), ends, b"".join(_ROW.pack(*row) for row in numbers))


def _row_problem(row: Any, end: int, tar_bytes: int, classes: int) -> str:
    """What is wrong with [key, offset, size, crc32, label], or ""."""
    if not isinstance(row, list) or len(row) != 5 or not all(type(v) is int for v in row[1:4]):
        return "not a row of key, offset, size, crc32, label"
    key, offset, size, crc32, label = row
    if not is_key(key):
        return "its name is not allowed (expected letters, digits, -, _ and / inside, no dots)"
    if not 0 < size <= MAX_MEMBER_BYTES or not 0 <= crc32 < 1 << 32:
        return f"its size is outside 1..{MAX_MEMBER_BYTES}, or its checksum has more than 32 bits"
    if offset % BLOCK or offset < end + BLOCK or offset + size > tar_bytes:
        return f"its place is outside the tar of {tar_bytes} bytes or overlaps another"
    if (label is None) != (classes == 0) or (label is not None and not (type(label) is int and 0 <= label < classes)):
        return f"its label does not fit {classes} classes"
    return ""


class ShardReader:
    """Random access to the samples of some shards of one folder. One per process; not thread-safe.

    at_once: shards that are read by turns, the indices of which are kept.
    """

    def __init__(self, store: Store, manifest: Manifest, shards: tuple[ShardInfo, ...], at_once: int = 0) -> None:
        self.store, self.manifest, self.shards, self.kept = store, manifest, shards, max(_INDICES_KEPT, at_once)
        self._tars = [f"{shard.name}.tar" for shard in shards]
        store.expect(expected_files(manifest))
        self._indices: OrderedDict[int, Index] = OrderedDict()
        self._bad = BadShards()
        self.on_read: Callable[[int, int, int], None] = lambda *_: None
        """Is told (shard, offset, size) before each read, INDEX for the index, and (-1, 0, 0) when it has ended."""

    def index(self, shard: int) -> Index:
        """The index of a shard by its number in `shards`; also checks that the tar has the size the manifest says."""
        if (known := self._indices.get(shard)) is not None and shard not in self._bad:
            self._indices.move_to_end(shard)
            return known
        if error := self._bad.error(shard):
            raise error
        if self._bad.begins(shard):
            self._indices.pop(shard, None)
            self.store.renew(f"{self.shards[shard].name}.index")
            self.store.renew(self._tars[shard])
        if shard in self._indices:
            self._indices.move_to_end(shard)
            return self._indices[shard]
        self.on_read(shard, INDEX, 0)
        try:
            index = self._load_index(shard)
        except DataError as error:
            self._bad.failed(shard, error)
            raise
        finally:
            self.on_read(-1, 0, 0)
        self._indices[shard] = index
        while len(self._indices) > self.kept:
            self._indices.popitem(last=False)
        return index

    def prepare(self, shards: Sequence[int], numbers: Sequence[int]) -> None:
        """Is told which samples will be read now, so that a store elsewhere can fetch several at a time."""
        if isinstance(self.store, NoMemory):
            return  # it has nothing to prepare, and this would cost as much as reading
        new = [s for s in sorted(set(shards)) if s not in self._indices and not self._bad.error(s)]
        self.store.prepare([(f"{self.shards[shard].name}.index", 0, 0) for shard in new])
        wanted = []
        for shard, number in zip(shards, numbers, strict=True):
            with contextlib.suppress(DataError):  # reading it will say so
                offset, size, _, _ = self.index(shard).row(number)
                wanted.append((self._tars[shard], offset, size))
        if wanted:
            self.on_read(shards[0], wanted[0][1], wanted[0][2])
            try:
                self.store.prepare(wanted)
            finally:
                self.on_read(-1, 0, 0)

    def known_key(self, shard: int, number: int) -> str:
        """The key of a sample, "" when the index of its shard is not at hand."""
        index = self._indices.get(shard)
        return "" if index is None else index.key(number)

    def _load_index(self, shard: int) -> Index:
        info = self.shards[shard]
        name = f"{info.name}.tar"
        if (size := self.store.size(name)) != info.bytes:
            what = "truncated" if size < info.bytes else "longer than packed"
            says = f"{size} bytes, the manifest says {info.bytes}"
            raise DataError("truncated", f"{self.store.url}/{name} is {what}: {says}", _REMEDY)
        return load_index(self.store, info, self.manifest.classes)

    def encoded(self, shard: int, number: int) -> tuple[str, bytes, int | None]:
        """Key, checked image bytes and label of one sample. Raises DataError naming shard and key, or StorageError."""
        index, name = self.index(shard), self._tars[shard]
        offset, size, crc32, label = index.row(number)
        self.on_read(shard, offset, size)
        try:
            data = self.store.read(name, offset, size)
            whole = len(data) == size and checksum(data) == crc32
            if not whole and self.store.forget(name, offset, size):  # a copy on the way was damaged, perhaps
                data = self.store.read(name, offset, size)
                whole = len(data) == size and checksum(data) == crc32
        except DataError as error:  # the file is not there, or another one is
            self._bad.failed(shard, error)
            raise
        finally:
            self.on_read(-1, 0, 0)
        if self._bad.works(shard):
            self.store.events.notes.append(f"{self.store.url}/{name} can be read again")
        if not whole:
            reason, what = (
                ("truncated", "is cut off") if len(data) != size else ("crc", "is damaged: its checksum differs")
            )
            raise DataError(reason, f"{self.store.url}/{name}: sample {index.key(number)!r} {what}", _REMEDY, data)
        return index.key(number), data, None if label < 0 else label

    def several(self, shards: Sequence[int], numbers: Sequence[int], enough: int) -> list[tuple[bytes, int] | None]:
        """Checked image bytes and labels (-1: none) of the first samples of these, until `enough` bytes are read.

        The quick way: one loop, the code of which stays in the processor's caches. None for a sample with which
        anything is not as it should be; `encoded` says what, or gets it in another way. Raises StorageError.
        """
        found: list[tuple[bytes, int] | None] = []
        read, tars, tell, bad = self.store.read, self._tars, self.on_read, self._bad
        known, used, unpack, row = self._indices.get, self._indices.move_to_end, _ROW.unpack_from, _ROW.size
        try:
            for shard, number in zip(shards, numbers, strict=True):
                if bad and shard in bad:
                    found.append(None)
                    continue
                try:
                    if (index := known(shard)) is None:
                        index = self.index(shard)
                    used(shard)
                    offset, size, crc32, label = unpack(index.packed, number * row)
                    tell(shard, offset, size)
                    data = read(tars[shard], offset, size)
                except DataError:
                    found.append(None)
                    continue
                found.append((data, label) if len(data) == size and checksum(data) == crc32 else None)
                enough -= size
                if enough <= 0:
                    break
        finally:
            tell(-1, 0, 0)
        return found

    def read(self, shard: int, number: int) -> Sample:
        """One decoded sample. Raises UserError naming shard and key."""
        m = self.manifest
        pixels = np.empty((m.resolution, m.resolution, m.channels), dtype=np.uint8)
        key, label = self.read_into(shard, number, pixels)
        return Sample(key, np.array(pixels.transpose(2, 0, 1), order="C"), label)

    def read_into(
        self, shard: int, number: int, out: npt.NDArray[np.uint8], *, turbo: bool = False, reduce: int = 1
    ) -> tuple[str, int | None]:
        """Decodes one sample into out (H, W, C), contiguous; key and label. Raises UserError naming shard and key.

        turbo: by `data.jpeg`, the same pixels faster; for JPEGs where `jpeg.unusable` knows nothing against it.
        reduce: so many times smaller a side than packed, see `decode.decode_into`.
        """
        key, data, label = self.encoded(shard, number)
        if not (turbo and jpeg.decode_into(data, out, reduce)):
            try:
                decode_into(data, out, image_format=self.manifest.image_format, reduce=reduce)
            except UserError as error:
                what = f"{self.store.url}/{self._tars[shard]}: sample {key!r}: {error.what}"
                raise DataError("decode", what, _REMEDY, data) from None
        return key, label

"""Files that torch.save wrote, read without torch.load: nothing in them can run.

Two layouts. Since torch 1.6 a zip archive: NAME/data.pkl, and NAME/data/KEY with the bytes of each storage. Before, a
sequence of pickles (magic number, version, facts on the machine, the object, keys of the storages) followed by each
storage as its number of elements (int64) and its bytes. `torch.load(weights_only=True)` reads neither objects of the
training code's classes nor tells of sizes before it allocates them, hence a reader of our own.
"""

from __future__ import annotations

import os
import stat
import struct
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sivae_dist.errors import UserError
from sivae_dist.interop import inert_pickle
from sivae_dist.interop.inert_pickle import DamagedError, Names, put_all, shown

MOST_STORAGES = 100_000
MOST_DIMENSIONS = 8
LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
PICKLE_START = b"\x80"  # the instruction PROTO, with which every pickle since protocol 2 begins

DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class Storage:
    """A run of `numel` elements somewhere in the file, or a part of one (from `start`)."""

    key: str
    dtype: torch.dtype
    numel: int
    start: int = 0


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor whose bytes have not been read: where it lies, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    """Checks that the tensor lies within its storage and is no larger (an expanded one could be endless)."""
    sizes = (offset, *shape, *stride)
    whole = all(isinstance(n, int) and 0 <= n < 2**62 for n in sizes)
    if not isinstance(storage, Storage) or not whole or len(shape) != len(stride) or len(shape) > MOST_DIMENSIONS:
        raise DamagedError("a tensor without a storage or with impossible sizes")
    numel = 1
    for size in shape:
        numel *= size
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if numel > storage.numel or (numel and last >= storage.numel):
        raise DamagedError(f"a tensor of shape {tuple(shape)} is larger than its storage of {storage.numel} elements")
    return StoredTensor(storage, offset, tuple(shape), tuple(stride))


def _parameter(data: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise DamagedError("a parameter without a tensor")
    return data


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise DamagedError("an OrderedDict of something else than pairs")
    return put_all({}, pairs)


def _set(items: Any = ()) -> set[Any]:
    if not isinstance(items, list | tuple):
        raise DamagedError("a set of something else than a list")
    return set(map(inert_pickle.plain_key, items))


# Names that stand for plain values. Parameter as of torch 0.3 (called with its data), _rebuild_parameter since.
PLAIN: Names = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("__builtin__", "set"): _set,
    ("builtins", "set"): _set,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.nn.parameter", "Parameter"): _parameter,
    **{("torch", name): None for name in DTYPES},
}


class TorchFile:
    """An open file: `tree` is what was saved, with StoredTensor for tensors; `tensor` reads one of them.

    names: classes of the training code that may occur; they become Inert. To be used as a context manager.
    Raises UserError for a file that asks for anything else, or is damaged.
    """

    def __init__(self, path: Path, names: Names) -> None:
        self.path, self.names = path, PLAIN | names
        self.storages: dict[str, Storage] = {}
        self._places: dict[str, int] = {}  # legacy layout: where each storage's bytes begin
        self._archive: zipfile.ZipFile | None = None
        self._prefix = ""
        self._file = _open(path)
        self._size = os.fstat(self._file.fileno()).st_size
        self._left = 2 * self._size  # bytes that `tensor` may still read: each storage belongs to one tensor, or nearly
        try:
            self.tree = self._guarded(self._read)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        if self._archive is not None:
            self._archive.close()
        self._file.close()

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The tensor's own contiguous copy. Raises UserError when its bytes are damaged or missing."""
        found: Tensor = self._guarded(self._tensor, stored)
        return found

    def _guarded(self, function: Any, *args: Any) -> Any:
        """Everything that garbled bytes make the standard library raise, as one message."""
        try:
            return function(*args)
        except (OSError, EOFError, ValueError, LookupError, TypeError, ArithmeticError, struct.error) as error:
            raise self._damaged(error) from error
        except (zipfile.BadZipFile, zlib.error, RuntimeError, MemoryError, AssertionError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: BaseException) -> UserError:
        return UserError(
            f"{self.path} is no complete file of torch.save: {type(error).__name__}: {shown(str(error))[1:-1]}",
            "get the file again; compare its size with the publisher's",
        )

    def _read(self) -> Any:
        if zipfile.is_zipfile(self._file):
            return self._read_zip()
        self._file.seek(0)
        start = self._file.read(1)
        self._file.seek(0)
        if start != PICKLE_START:
            raise DamagedError("neither a whole zip archive nor a pickle")
        return self._read_legacy()

    def _read_zip(self) -> Any:
        self._archive = archive = zipfile.ZipFile(self._file)
        members = archive.infolist()
        if len(members) > MOST_STORAGES or sum(m.file_size for m in members) > self._size:
            raise DamagedError("more, or larger, members than the file can hold")
        pickles = [m.filename for m in members if m.filename.count("/") == 1 and m.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise DamagedError("a zip archive, but not with one NAME/data.pkl in it")
        self._prefix = pickles[0].removesuffix("data.pkl")
        order = self._prefix + "byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise DamagedError("its numbers are big-endian")
        if archive.getinfo(pickles[0]).file_size > inert_pickle.MOST_BYTES:
            raise DamagedError("its pickle is too large for a checkpoint")
        with archive.open(pickles[0]) as file:
            return inert_pickle.read(file, self.names, self._persistent)  # type: ignore[arg-type]

    def _read_legacy(self) -> Any:
        file = self._file
        magic, version, machine = (inert_pickle.read(file, {}, self._persistent) for _ in range(3))
        if magic != LEGACY_MAGIC or version != LEGACY_VERSION:
            raise DamagedError("a pickle, but not one that torch.save wrote")
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise DamagedError("its numbers are big-endian")
        tree = inert_pickle.read(file, self.names, self._persistent)
        keys = inert_pickle.read(file, {}, self._persistent)
        if not isinstance(keys, list) or set(keys) != self.storages.keys() or len(keys) != len(self.storages):
            raise DamagedError("its list of storages does not agree with its tensors")
        for key in keys:
            (numel,) = struct.unpack("<q", file.read(8))
            storage = self.storages[key]
            self._places[key] = file.tell()
            end = file.tell() + numel * storage.dtype.itemsize
            if numel != storage.numel or end > self._size:
                raise DamagedError(f"storage {shown(key)} should have {storage.numel} elements")
            file.seek(end)
        return tree

    def _persistent(self, identifier: Any) -> Any:
        """('storage', class, key, device, numel[, view]) or, of the legacy layout, ('module', class, file, source)."""
        if not isinstance(identifier, tuple) or not identifier:
            raise DamagedError("an identifier that is no tuple")
        if identifier[0] == "module" and len(identifier) == 4:
            return identifier[1]  # the class itself, an inert name; its source text is not looked at
        _, kind, key, _, numel, *view = identifier
        if not isinstance(kind, inert_pickle.Named) or kind.name[0] != "torch" or kind.name[1] not in DTYPES:
            raise DamagedError("a storage of no known class")
        if not isinstance(key, str) or not isinstance(numel, int) or not 0 <= numel < 2**48:
            raise DamagedError("a storage without key or size")
        storage = self.storages.setdefault(key, Storage(key, DTYPES[kind.name[1]], numel))
        if (storage.dtype, storage.numel) != (DTYPES[kind.name[1]], numel) or len(self.storages) > MOST_STORAGES:
            raise DamagedError(f"storage {shown(key)} is described twice, or there are too many")
        if view and view[0] is not None:
            _, start, length = view[0]
            if not (isinstance(start, int) and isinstance(length, int) and 0 <= start <= start + length <= numel):
                raise DamagedError("a view beyond its storage")
            return Storage(key, storage.dtype, length, start)
        return storage

    def _tensor(self, stored: StoredTensor) -> Tensor:
        storage = self.storages[stored.storage.key]
        if storage.numel == 0:
            return torch.empty(stored.shape, dtype=storage.dtype)
        size = storage.numel * storage.dtype.itemsize
        data = (
            self._read_member(f"{self._prefix}data/{storage.key}", size)
            if self._archive
            else self._read_place(self._places[storage.key], size)
        )
        whole = torch.frombuffer(data, dtype=storage.dtype)
        offset = stored.storage.start + stored.offset
        return whole.as_strided(stored.shape, stored.stride, offset).clone(memory_format=torch.contiguous_format)

    def _buffer(self, size: int) -> bytearray:
        self._left -= size
        if self._left < 0:
            raise DamagedError("its tensors share storages so often that they are larger than the file")
        return bytearray(size)

    def _read_place(self, place: int, size: int) -> bytearray:
        data = self._buffer(size)
        self._file.seek(place)
        if self._file.readinto(data) != size:  # type: ignore[attr-defined]
            raise DamagedError("it ends in the middle of a tensor")
        return data

    def _read_member(self, name: str, size: int) -> bytearray:
        assert self._archive is not None
        member = self._archive.getinfo(name)
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != size:
            raise DamagedError(f"{shown(name)} has {member.file_size} bytes, expected {size}, uncompressed")
        data = self._buffer(size)
        view, done = memoryview(data), 0
        with self._archive.open(member) as file:
            while done < size and (count := file.readinto(view[done : done + (16 << 20)])):  # type: ignore[attr-defined]
                done += count
            if done != size or file.read(1):  # reading to the end is what checks the checksum
                raise DamagedError(f"{shown(name)} ends too early")
        return data


def _open(path: Path) -> BinaryIO:
    if sys.byteorder != "little":
        raise UserError("importing needs a little-endian machine", "import on another machine and copy the run folder")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path} is no file", "give the .pth file itself")
        return open(path, "rb")
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}", "give the path of a published .pth file"
        ) from error

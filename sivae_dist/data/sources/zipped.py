"""A zip of pictures, read in place: nothing is unpacked, and no name in it is ever used as a path.

Names, sizes and places come from the archive's directory, read once; a picture is then one ranged read, which works
from any number of processes at a time. Archives may come from strangers: how many members there are, how large each may
get and that none lies inside another is checked before; what comes out is compared with size and checksum.
"""

from __future__ import annotations

import bisect
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sivae_dist.data.decode import MAX_PIXELS, open_image
from sivae_dist.data.sources.base import Item, Recipe
from sivae_dist.data.sources.folder import is_picture, safe_key, shared_stems
from sivae_dist.errors import UserError
from sivae_dist.files import expanded

MAX_MEMBERS = 4_000_000
MAX_MEMBER_BYTES = 256 << 20  # of one picture, packed or not
LABELS = "dataset.json"
_MAX_LABELS_BYTES = 512 << 20
_METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}
_HEADER = 30  # bytes before the name of a member
_ENCRYPTED = 1
_HIDDEN = (".", "__MACOSX")


@dataclass
class ZipSource:
    """Every picture in the zip file `root`, by extension and in order of name; hidden members are passed over.

    labels: classes from dataset.json, where the archive has one with labels (as StyleGAN's tools write it: {"labels":
    [[name, class], ...]}), else the first sub-folder of each picture is its class, numbered in order of name.
    """

    root: Path
    name: str = ""
    license: str = "unknown"
    labels: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        self.root = expanded(self.root)
        self.name = self.name or self.root.stem
        self.class_names: tuple[str, ...] = ()
        self._descriptor: int | None = None
        try:
            with zipfile.ZipFile(self.root) as archive:
                self._read_directory(archive)
                self._label = self._labels(archive) if self.labels else None
        except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, struct.error) as error:
            raise UserError(f"{self.root} is no readable zip: {error}", "copy or download it again") from None
        except OSError as error:
            raise UserError(f"{self.root} cannot be read: {error.strerror}", "give the zip file of pictures") from None

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self._names)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def items(self) -> Iterator[Item]:
        """All pictures in order of name."""
        shared = shared_stems(self._names)
        for number, name in enumerate(self._names):
            stem = os.path.splitext(name)[0]
            plain = all(part not in ("", ".", "..") for part in stem.split("/"))
            key = safe_key(stem if plain else "x", name, unique=plain and not shared(stem))
            label = None if self._label is None else int(self._label[number])
            yield Item(key, label=label, meta={"file": name})

    def open(self, item: Item, resolution: int) -> Image.Image:
        """The picture, not yet decompressed. Raises UserError or OSError."""
        number = bisect.bisect_left(self._names, str(item.meta["file"]))
        return open_image(self._member(number), max_pixels=self.max_pixels)

    def _read_directory(self, archive: zipfile.ZipFile) -> None:
        members = archive.infolist()
        if len(members) > MAX_MEMBERS:
            raise UserError(f"{self.root} has {len(members):,} members, more than {MAX_MEMBERS:,}", "split it")
        pictures = [m for m in members if is_picture(m.filename) and not m.is_dir() and not _hidden(m.filename)]
        pictures.sort(key=lambda m: m.filename)
        self._names = [m.filename for m in pictures]
        for first, second in zip(self._names, self._names[1:], strict=False):
            if first == second:
                raise UserError(f"{self.root} has two members {first!r:.200}", "make the archive again")
        rows = [(m.header_offset, m.compress_size, m.file_size, m.CRC, m.compress_type, m.flag_bits) for m in pictures]
        self._rows: npt.NDArray[np.int64] = np.array(rows, dtype=np.int64).reshape(-1, 6)
        places = self._rows[np.argsort(self._rows[:, 0])]
        if np.any(places[:-1, 0] + _HEADER + places[:-1, 1] > places[1:, 0]):
            raise UserError(f"{self.root} has members that lie inside one another", "it is damaged or made to do harm")

    def _labels(self, archive: zipfile.ZipFile) -> npt.NDArray[np.int32]:
        """The class of each picture, in the order of the names."""
        if LABELS in archive.namelist():
            where = f"{LABELS} in {self.root}"
            if (size := archive.getinfo(LABELS).file_size) > _MAX_LABELS_BYTES:
                raise UserError(f"{where} has {size} bytes, more than {_MAX_LABELS_BYTES}", "shorten it")
            found = _parsed(_unpacked(archive, where), where)
            if found is not None:
                if lost := next((name for name in self._names if name not in found), None):
                    what = f"{where} has no label for {lost!r:.200}"
                    raise UserError(what, "complete it, or drop --labels")
                return np.array([found[name] for name in self._names], dtype=np.int32)
        folders = [name.partition("/")[0] if "/" in name else None for name in self._names]
        if None in folders:
            what = f"{self._names[folders.index(None)]!r:.200} in {self.root} lies in no sub-folder, so it has no label"
            raise UserError(what, "move it into the folder of its class, or drop --labels")
        self.class_names = tuple(sorted({folder for folder in folders if folder is not None}))
        number = {folder: n for n, folder in enumerate(self.class_names)}
        return np.array([number[folder] for folder in folders if folder is not None], dtype=np.int32)

    def _member(self, number: int) -> bytes:
        offset, packed, size, crc32, method, flags = self._rows[number].tolist()
        if flags & _ENCRYPTED:
            raise UserError("encrypted", "unpack the archive with its password")
        if method not in _METHODS:
            raise UserError(f"packed with method {method}, expected {' or '.join(_METHODS.values())}", "pack it again")
        if max(packed, size) > MAX_MEMBER_BYTES:
            raise UserError(f"{max(packed, size)} bytes, more than the limit of {MAX_MEMBER_BYTES}", "remove it")
        header = self._range(offset, _HEADER)
        if header[:4] != b"PK\x03\x04":
            raise UserError("not where the directory of the zip says", "copy or download the zip again")
        skipped = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = self._range(offset + _HEADER + skipped, packed)
        if method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)  # never more than announced
            except zlib.error as error:
                raise UserError(f"damaged in the zip: {error}", "copy or download the zip again") from None
        if len(data) != size or zlib.crc32(data) != crc32:
            raise UserError("damaged in the zip: size or checksum differ", "copy or download the zip again")
        return data

    def _range(self, offset: int, length: int) -> bytes:
        if self._descriptor is None:
            self._descriptor = os.open(self.root, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        parts = []
        while length > 0 and (part := os.pread(self._descriptor, length, offset)):
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        if length > 0:
            raise UserError("cut off in the zip", "copy or download the zip again")
        return b"".join(parts)


@dataclass(frozen=True)
class ZipRecipe(Recipe):
    """Any zip of pictures."""

    name: str = "zip"

    def build(self) -> ZipSource:
        """Reads the directory of the archive."""
        self.refuse("attribute", "partial")
        return ZipSource(self.root, name=self.title, license=self.license or "unknown", labels=self.labels)


def _hidden(name: str) -> bool:
    return any(part.startswith(_HIDDEN) and part not in (".", "..") for part in name.split("/"))


def _unpacked(archive: zipfile.ZipFile, where: str) -> bytes:
    """The bytes of dataset.json. Raises UserError."""
    try:
        return archive.read(LABELS)
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # RuntimeError where encrypted, zlib.error, LZMAError, OSError, EOFError, BadZipFile, ...
        if isinstance(error, OSError) and error.errno is not None:
            raise
        fix = "make the archive again, without a password, or drop --labels"
        raise UserError(f"{where} cannot be unpacked: {str(error) or type(error).__name__:.300}", fix) from None


def _parsed(data: bytes, where: str) -> dict[str, int] | None:
    """{name: class} from {"labels": [[name, class], ...]}; None when there are no labels in it. Raises UserError."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}", "correct it, or drop --labels") from None
    pairs = raw.get("labels") if isinstance(raw, dict) else None
    if pairs is None:
        return None
    good = isinstance(pairs, list) and all(
        isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) and type(p[1]) is int for p in pairs
    )
    if not good:
        what = f'{where} has labels that are not understood, expected {{"labels": [["00000/a.png", 3], ...]}}'
        raise UserError(what, "correct it, or drop --labels")
    return dict(pairs)

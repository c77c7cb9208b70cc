"""The file at the root of a pyramid: which resolutions it has, and the fingerprint of each. Format in docs/data.md.

Servers do not list folders, so this tells what there is; and it holds the levels together, so that one that was packed
again, or copied from elsewhere, is noticed. It may come from strangers and is checked like a manifest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sivae_dist.data.faults import DataError, RefusedError
from sivae_dist.data.manifest import MAX_RESOLUTION, Manifest, checksum
from sivae_dist.data.stores.base import REREADS, Store
from sivae_dist.errors import UserError

FORMAT = "sivae-pyramid"
VERSION = 1
FILE_NAME = "pyramid.json"
MAX_BYTES = 1 << 20
_MAX_LEVELS = 64
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIX = "copy it again; or remove it and run the same `sivae-dist data pack` again, which writes it anew"


@dataclass(frozen=True)
class PyramidFile:
    """levels: (resolution, fingerprint of its manifest), the smallest resolution first."""

    levels: tuple[tuple[int, str], ...]

    @classmethod
    def of(cls, manifests: Sequence[Manifest]) -> PyramidFile:
        """The file that belongs to these levels."""
        return cls(tuple(sorted((m.resolution, m.fingerprint) for m in manifests)))

    @property
    def resolutions(self) -> tuple[int, ...]:
        """All of them, the smallest first."""
        return tuple(side for side, _ in self.levels)

    def fingerprint(self, side: int) -> str:
        """The fingerprint of a level that is listed."""
        return dict(self.levels)[side]

    def to_bytes(self) -> bytes:
        """The file: JSON, the same bytes for the same levels, its checksum among them."""
        levels = [{"resolution": side, "fingerprint": fingerprint} for side, fingerprint in self.levels]
        raw: dict[str, Any] = {"format": FORMAT, "version": VERSION, "levels": levels}
        return (json.dumps(raw | {"checksum": checksum(raw)}, indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> PyramidFile:
        """Reads and checks a file; `where` names it in messages. Raises UserError."""
        try:
            raw = json.loads(data)
            right = isinstance(raw, dict) and raw.get("checksum") == checksum(raw)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not valid JSON: {error}", _FIX) from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise UserError(f"{where} does not tell the resolutions of a pyramid", _FIX)
        if raw.get("version") != VERSION:
            what = f"{where} has format version {raw.get('version')!r:.80}, this program reads version {VERSION}"
            raise UserError(what, "update sivae-dist, or give one of the folders in it")
        if not right:
            raise UserError(f"{where} is damaged: its checksum differs", _FIX)
        levels = raw.get("levels")
        if not isinstance(levels, list) or not 1 <= len(levels) <= _MAX_LEVELS:
            raise UserError(f"{where} has levels = {levels!r:.80}, expected a list of 1 to {_MAX_LEVELS}", _FIX)
        found = tuple(_level(entry, where) for entry in levels)
        sides = [side for side, _ in found]
        if sides != sorted(set(sides)):
            raise UserError(f"{where} has levels of {sides!r:.80}, expected each once, the smallest first", _FIX)
        return cls(found)


def several(url: str, folders: Iterable[object]) -> DataError:
    """The error for a folder of shard folders, where one of them is wanted."""
    names = sorted(map(str, folders), key=lambda name: (len(name), name) if name.isdecimal() else (1000, name))
    what = f"{url} holds several packed data sets"
    return DataError("missing", what, f"give one of its folders: {', '.join(names)}")


def _level(entry: Any, where: str) -> tuple[int, str]:
    side = entry.get("resolution") if isinstance(entry, dict) else None
    fingerprint = entry.get("fingerprint") if isinstance(entry, dict) else None
    if not isinstance(side, int) or isinstance(side, bool) or not 1 <= side <= MAX_RESOLUTION:
        raise UserError(f"{where} has a level of {side!r:.80} pixels, expected 1 to {MAX_RESOLUTION}", _FIX)
    if not isinstance(fingerprint, str) or not _SHA256.fullmatch(fingerprint):
        raise UserError(f"{where} has a malformed fingerprint for the level of {side} pixels", _FIX)
    return side, fingerprint


def read_pyramid(store: Store) -> PyramidFile | None:
    """The file of a pyramid's root; None where there is none, as in data packed before there was one. Raises UserError.

    What was damaged on its way is read again, as long as other bytes come; the same bytes twice are what lies there.
    """
    before = b""
    for left in reversed(range(REREADS)):
        try:
            data = store.whole(FILE_NAME, MAX_BYTES)
        except RefusedError:  # some servers say so of what is not there
            return None
        except DataError as error:
            if error.reason == "missing":
                return None
            raise
        try:
            return PyramidFile.from_bytes(data, f"{store.url}/{FILE_NAME}")
        except UserError:
            if not left or data == before or not store.forget(FILE_NAME, 0, 0):
                raise
        before = data
    raise AssertionError("unreachable")

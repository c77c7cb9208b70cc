"""The manifest of a shard folder: what it holds, shard by shard. Format in docs/data.md.

Manifests may come from strangers: sizes, types, names and versions are checked before anything is believed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from sivae_dist.errors import UserError

FORMAT = "sivae-shards"
VERSION = 1
FILE_NAME = "manifest.json"
SPLITS = ("train", "val")
EXTENSIONS = ("jpg", "webp", "png")

MAX_MANIFEST_BYTES = 256 << 20
MAX_INDEX_BYTES = 256 << 20
MAX_MEMBER_BYTES = 64 << 20
MAX_SHARD_SAMPLES = 1 << 24
MAX_RESOLUTION = 8192
MAX_CLASSES = 1 << 20
MAX_KEY = 200

_KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def checksum(raw: dict[str, Any]) -> str:
    """sha256 (hex) of all fields of a manifest but the checksum itself; line ends and spacing do not count."""
    content = {name: value for name, value in raw.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _checksum_or_none(raw: dict[str, Any]) -> str | None:
    try:
        return checksum(raw)
    except (ValueError, RecursionError):  # nested too deeply to be written
        return None


def is_key(key: object) -> bool:
    """Whether a sample key is safe as a path and as a WebDataset key: relative, no dots, plain characters."""
    return isinstance(key, str) and len(key) <= MAX_KEY and _KEY.fullmatch(key) is not None


@dataclass(frozen=True)
class ShardInfo:
    """One shard. bytes, sha256: of NAME.tar; index_sha256: of NAME.index; both files lie beside the manifest."""

    name: str
    split: str
    count: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """A shard folder. classes is 0 without labels; packing: the options it was packed with, for the record.

    recorded_fingerprint: what the file says, "" when it was not read from one; `fingerprint` is computed.
    """

    name: str
    license: str
    resolution: int
    channels: int
    image_format: str
    classes: int
    class_names: tuple[str, ...]
    shards: tuple[ShardInfo, ...]
    packing: dict[str, Any] = field(default_factory=dict, compare=False)
    recorded_fingerprint: str = field(default="", compare=False, repr=False)

    def of(self, split: str) -> tuple[ShardInfo, ...]:
        """The shards of a split, in order; empty when there is no such split."""
        return tuple(s for s in self.shards if s.split == split)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides which samples there are (hex). Renaming a data set does not change it."""
        content = [VERSION, self.resolution, self.channels, self.classes]
        shards = [[s.name, s.split, s.count, s.sha256, s.index_sha256] for s in self.shards]
        return hashlib.sha256(json.dumps([content, shards], separators=(",", ":")).encode()).hexdigest()

    def splits(self) -> dict[str, dict[str, int]]:
        """{split: {"shards": n, "samples": n, "bytes": n}}."""
        found = [name for name in SPLITS if self.of(name)]
        return {
            name: {
                "shards": len(self.of(name)),
                "samples": sum(s.count for s in self.of(name)),
                "bytes": sum(s.bytes for s in self.of(name)),
            }
            for name in found
        }

    def to_bytes(self) -> bytes:
        """The file: JSON with one shard a line, the same bytes for the same manifest, its checksum among them."""
        head = {"format": FORMAT, "version": VERSION} | {
            name: getattr(self, name)
            for name in ("name", "license", "resolution", "channels", "image_format", "classes", "class_names")
        }
        head |= {"splits": self.splits(), "fingerprint": self.fingerprint, "packing": self.packing}
        shards = [asdict(shard) for shard in self.shards]
        head["checksum"] = checksum(head | {"shards": shards})
        lines = ",\n  ".join(json.dumps(shard) for shard in shards)
        body = json.dumps(head, indent=1)[:-2]  # without the closing brace, to lay the shards out one a line
        return f'{body},\n "shards": [\n  {lines}\n ]\n}}\n'.encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Reads and checks a manifest; `where` names it in messages. Raises UserError."""
        try:
            raw = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not valid JSON: {error}", "copy the data set again or pack it again") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise UserError(f"{where} is no manifest of sivae shards", "make one with `sivae-dist data pack`")
        if raw.get("version") != VERSION:
            raise UserError(
                f"{where} has format version {raw.get('version')!r:.80}, this program reads version {VERSION}",
                "update sivae-dist, or pack the data set again with this version",
            )
        if "checksum" in raw and raw["checksum"] != _checksum_or_none(raw):
            what = f"{where} is damaged: its checksum differs"
            fix = 'copy it again or pack the data set again; where it was edited on purpose, remove "checksum" from it'
            raise UserError(what, fix)
        check = _Checker(where)
        shards = tuple(_shard(entry, check) for entry in check.field(raw, "shards", list))
        if len({s.name for s in shards}) != len(shards):
            check.fail("lists a shard twice")
        classes = check.number(raw, "classes", 0, MAX_CLASSES)
        names = check.field(raw, "class_names", list)
        if not all(isinstance(n, str) for n in names) or len(names) not in (0, classes):
            check.fail(f"has {len(names)} class names for {classes} classes")
        channels = check.number(raw, "channels", 1, 3)
        image_format = check.field(raw, "image_format", str)
        if channels == 2 or image_format not in EXTENSIONS:
            check.fail(
                f"has {channels} channels of format {image_format!r:.80}, expected 1 or 3 of {', '.join(EXTENSIONS)}"
            )
        return cls(
            name=check.field(raw, "name", str),
            license=check.field(raw, "license", str),
            resolution=check.number(raw, "resolution", 1, MAX_RESOLUTION),
            channels=channels,
            image_format=image_format,
            classes=classes,
            class_names=tuple(names),
            shards=shards,
            packing=check.field(raw, "packing", dict),
            recorded_fingerprint=str(raw.get("fingerprint", "")),
        )


class _Checker:
    """Typed access to fields of untrusted JSON."""

    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, what: str) -> None:
        raise UserError(f"{self.where} {what}", "copy the data set again or pack it again")

    def field(self, raw: Any, name: str, kind: type) -> Any:
        value = raw.get(name) if isinstance(raw, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            self.fail(f"has {name} = {value!r:.80}, expected {kind.__name__}")
        return value

    def number(self, raw: Any, name: str, low: int, high: int) -> int:
        value: int = self.field(raw, name, int)
        if not low <= value <= high:
            self.fail(f"has {name} = {value}, expected {low} to {high}")
        return value


def _shard(raw: Any, check: _Checker) -> ShardInfo:
    name, split = check.field(raw, "name", str), check.field(raw, "split", str)
    if not _SHARD_NAME.fullmatch(name):
        check.fail(f"has a shard called {name!r:.120}, expected letters, digits, - and _ only")
    if split not in SPLITS:
        check.fail(f"has split {split!r:.80} for {name}, expected one of {', '.join(SPLITS)}")
    hashes = [check.field(raw, part, str) for part in ("sha256", "index_sha256")]
    if not all(_SHA256.fullmatch(h) for h in hashes):
        check.fail(f"has a malformed checksum for {name}")
    count, size = check.number(raw, "count", 0, MAX_SHARD_SAMPLES), check.number(raw, "bytes", 0, 1 << 50)
    return ShardInfo(name, split, count, size, hashes[0], hashes[1])

"""One unit of the packer's work: a shard at every resolution, from its items to its files and the note of its end.

Pictures are read once and stored at all resolutions asked for; a picture that fails at one of them is left out of all,
so that the shards of a pyramid hold the same samples in the same order.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sivae_dist.data.decode import encode, resized, square
from sivae_dist.data.manifest import EXTENSIONS, MAX_MEMBER_BYTES, MAX_RESOLUTION, ShardInfo
from sivae_dist.data.pack_items import read_items
from sivae_dist.data.procs import Tick
from sivae_dist.data.shard_write import ShardWriter
from sivae_dist.data.sources.base import Item, Source
from sivae_dist.errors import UserError
from sivae_dist.files import write_atomically

_BRING_BACK = "see that the source can be read and run the same command again: finished shards are kept"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB|KIB|MIB|GIB|TIB)", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class PackOptions:
    """All that decides the bytes of a packed data set, apart from the source. Checked on construction (UserError).

    resolution: side of the stored pictures, or several of them for a pyramid: a shard folder each, from one reading.
    format: jpg, webp or png; quality: 1..100 for jpg and webp, None means 95.
    channels: 3 (RGB) or 1 (grey).
    shard_size: "auto" (1,024 samples or about 256 MB, whichever is less), a number of samples ("1000"), or about so
    many bytes ("256MB"; sizes are estimated from some pictures beforehand).
    val_fraction, val_count: hold out this part, by hash of the key; for sources without a split of their own.
    shuffle: put samples into shards in an order drawn from `seed`, so that shards do not follow the source's order.
    """

    resolution: int | tuple[int, ...]
    format: str = "jpg"
    quality: int | None = None
    channels: int = 3
    shard_size: str = "auto"
    val_fraction: float = 0.0
    val_count: int = 0
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise UserError(f"{name} is {getattr(self, name)!r}, expected {expected}", f"correct --{name}")

        sides = self.resolutions
        need(bool(sides), "resolution", "one or several numbers of pixels")
        need(all(1 <= side <= MAX_RESOLUTION for side in sides), "resolution", f"1 to {MAX_RESOLUTION} pixels")
        need(list(sides) == sorted(set(sides)), "resolution", "every resolution once, the smallest first")
        need(self.format in EXTENSIONS, "format", f"one of {', '.join(EXTENSIONS)}")
        need(self.quality is None or 1 <= self.quality <= 100, "quality", "1 to 100")
        need(self.quality is None or self.format != "png", "quality", "none for png, which is lossless")
        need(self.channels in (1, 3), "channels", "3 (RGB) or 1 (grey)")
        need(0.0 <= self.val_fraction < 1.0, "val_fraction", "0 to below 1")
        need(self.val_count >= 0, "val_count", "0 or more")
        need(not (self.val_count and self.val_fraction), "val_count", "0 when val_fraction is given")
        need(_limits(self.shard_size) is not None, "shard_size", "auto, a number of samples, or a size such as 256MB")

    @property
    def resolutions(self) -> tuple[int, ...]:
        """All resolutions, the smallest first."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution,)

    def folders(self, destination: Path) -> tuple[Path, ...]:
        """The shard folder of each resolution: `destination` itself, or its sub-folders 256, 512, ... in a pyramid."""
        if isinstance(self.resolution, int):
            return (destination,)
        return tuple(destination / str(side) for side in self.resolution)

    def samples_per_shard(self, mean_bytes: float) -> int:
        """Samples per shard for samples of mean_bytes bytes (their tar headers included).

        In a pyramid the largest resolution decides: all resolutions have the same shards.
        """
        limits = _limits(self.shard_size)
        assert limits is not None
        samples, size = limits
        return max(1, min(samples, int(size / mean_bytes)))


def _limits(shard_size: str) -> tuple[int, float] | None:
    """(samples, bytes) a shard may have, or None for a text that is no size."""
    text = shard_size.strip()
    if text == "auto":
        return 1024, 256e6
    if text.isdecimal():
        return (int(text), 1e18) if int(text) else None
    match = _SIZE.fullmatch(text)
    size = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    return (1 << 30, size) if size else None


@dataclass(frozen=True)
class ShardTask:
    """A shard to make. offsets: where its items stand in the list."""

    name: str
    split: str
    offsets: npt.NDArray[np.uint64]


@dataclass(frozen=True)
class ShardDone:
    """A shard made. infos: one a resolution; skipped: (key, reason); enlarged: smaller than the largest resolution."""

    infos: tuple[ShardInfo, ...]
    skipped: tuple[tuple[str, str], ...]
    enlarged: int

    @property
    def name(self) -> str:
        """The shard's name, the same at all resolutions."""
        return self.infos[0].name

    @property
    def count(self) -> int:
        """Samples it holds, the same at all resolutions."""
        return self.infos[0].count

    def save(self, path: Path) -> None:
        """Writes the note that the shard is done. Its files must be safe on the disk before."""
        write_atomically(path, json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, path: Path, folders: tuple[Path, ...]) -> ShardDone | None:
        """The note, or None when there is none or the shard's files are not there as it says."""
        try:
            raw = json.loads(path.read_bytes())
            infos = tuple(ShardInfo(**info) for info in raw["infos"])
            done = cls(infos, tuple((k, r) for k, r in raw["skipped"]), raw["enlarged"])
            there = all(_is_there(info, folder) for info, folder in zip(infos, folders, strict=True))
            return done if there else None
        except (OSError, ValueError, TypeError, KeyError):
            return None


def _is_there(info: ShardInfo, folder: Path) -> bool:
    index = (folder / f"{info.name}.index").read_bytes()
    same = hashlib.sha256(index).hexdigest() == info.index_sha256
    return same and (folder / f"{info.name}.tar").stat().st_size == info.bytes


class SourceLostError(UserError):
    """The disk, the network, a permission or this process's limits fail, not the picture: no reason to leave it out.

    A single file that may not be read counts, too: all of them look like that once a ticket of the network's has ended.
    """


def encoded(source: Source, item: Item, options: PackOptions) -> tuple[list[bytes], bool]:
    """The bytes of an item's picture at each resolution, and whether it had to be enlarged for the largest.

    Raises whatever reading it raises; SourceLostError where not the picture is at fault but what holds it.
    """
    largest = options.resolutions[-1]
    try:
        with source.open(item, largest) as image:
            small = min(image.size) < largest
            whole = square(image, options.channels)
    except OSError as error:
        if error.errno is None:  # Pillow's own: truncated, cannot identify, ...
            raise
        file = item.meta.get("file", item.key)
        what = f"{file} of {source.name} cannot be read: {os.strerror(error.errno)}"
        raise SourceLostError(what, _BRING_BACK) from error
    versions = []
    for side in options.resolutions:
        versions.append(encode(resized(whole, side), options.format, options.quality))
        if len(versions[-1]) > MAX_MEMBER_BYTES:
            raise UserError(f"encodes to {len(versions[-1])} bytes, more than the limit of {MAX_MEMBER_BYTES}")
    return versions, small


def pack_shard(
    task: ShardTask,
    tick: Tick,
    *,
    source: Source,
    options: PackOptions,
    items: Path,
    folders: tuple[Path, ...],
    aside: Path,
) -> ShardDone:
    """Makes one shard in each folder; `tick` is called once a picture. Unreadable pictures are skipped and noted."""
    writers: list[ShardWriter] = []
    skipped: list[tuple[str, str]] = []
    enlarged = 0
    try:
        for folder, side in zip(folders, options.resolutions, strict=True):
            writers.append(ShardWriter(folder, task.name, task.split, aside / str(side)))
        for item in read_items(items, task.offsets):
            tick()
            picture = _try(source, item, options)
            if isinstance(picture, str):
                skipped.append((item.key, picture))
                continue
            for writer, data in zip(writers, picture[0], strict=True):
                writer.add(item.key, options.format, data, item.label, item.meta)
            enlarged += picture[1]
        infos = tuple(writer.finish() for writer in writers)
        done = ShardDone(infos, tuple(skipped), enlarged)
        done.save(aside / f"{task.name}.done")
    except BaseException as error:
        for writer in writers:
            writer.abort()
        if isinstance(error, OSError):
            what = f"{folders[0] / task.name}.tar cannot be written: {error.strerror}"
            fix = "make room (or mend the disk) and run the same command again: finished shards are kept"
            raise UserError(what, fix) from None
        raise
    return done


def _try(source: Source, item: Item, options: PackOptions) -> tuple[list[bytes], bool] | str:
    """As `encoded`, or the reason why not. All but a lost source counts: decoders raise all kinds on damaged files."""
    try:
        return encoded(source, item, options)
    except (MemoryError, AssertionError, SourceLostError):
        raise
    except UserError as error:
        return error.what
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def recorded(options: PackOptions, source: Source, items_sha256: str) -> dict[str, Any]:
    """What is noted of a packing, to be compared when it is continued."""
    note = {"source": source.name, "items_sha256": items_sha256} | asdict(options)
    return note | {"resolution": options.resolution if isinstance(options.resolution, int) else [*options.resolutions]}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Readable differences between two such notes."""
    changed = [name for name, value in new.items() if old.get(name) != value]
    return [
        "the pictures in the source are others"
        if name == "items_sha256"
        else f"{name} was {old.get(name)!r}, now {new[name]!r}"
        for name in changed
    ]

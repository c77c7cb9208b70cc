"""The packer's list of items.

It lies on disk, so that millions of them need little memory, and it is hashed, so that it cannot change between an
interrupted run and its continuation unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sivae_dist.counters import key as counter_key
from sivae_dist.counters import permutation
from sivae_dist.data.manifest import MAX_CLASSES, MAX_KEY, SPLITS, is_key
from sivae_dist.data.shard_write import member_header
from sivae_dist.data.sources.base import Item, Source
from sivae_dist.errors import UserError
from sivae_dist.progress import Bar

_FIX = "correct the data source"
_ALWAYS_FITS = 95  # a tar header holds names of 100 characters, longer ones only if they can be cut at a slash


@dataclass(frozen=True)
class ItemList:
    """Items as JSON lines in a file. offset: (n,) where each line begins; val: (n,) bool; classes: 0 without labels."""

    path: Path
    offset: npt.NDArray[np.uint64]
    val: npt.NDArray[np.bool_]
    classes: int
    sha256: str

    def __len__(self) -> int:
        return len(self.offset)

    def order(self, split: str, seed: int, *, shuffle: bool) -> npt.NDArray[np.int64]:
        """Numbers of the split's items in the order in which they are packed."""
        numbers = np.flatnonzero(self.val == (split == "val"))
        return numbers[permutation(counter_key(seed, "pack", split), len(numbers))] if shuffle else numbers


def read_items(path: Path, offsets: npt.NDArray[np.uint64]) -> list[Item]:
    """The items at these places of the list, in this order."""
    items = []
    with open(path, "rb") as file:
        for offset in offsets.tolist():
            file.seek(offset)
            key, label, meta = json.loads(file.readline())
            items.append(Item(key, label=label, meta=meta))
    return items


def list_items(source: Source, path: Path, *, val_fraction: float, val_count: int, progress: bool = False) -> ItemList:
    """Writes the items of a source to `path`, checking keys and labels and choosing the validation split.

    The source's own split is kept; else the items with the smallest hash of their key are held out, so that the choice
    depends on nothing else and stays when the data set grows.
    """
    offsets, hashes = array("Q"), array("Q")
    own_val = bytearray()
    digest, position = hashlib.sha256(), 0
    highest, unlabelled = -1, 0
    to_json = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
    with open(path, "wb") as file, _listing(source, progress) as found:
        for item in found:
            _check(item)
            line = to_json([item.key, item.label, item.meta]).encode() + b"\n"
            file.write(line)
            digest.update(item.split.encode() + line)
            offsets.append(position)
            position += len(line)
            hashes.append(int.from_bytes(hashlib.sha256(item.key.encode()).digest()[:8], "big"))
            own_val.append(item.split == "val")
            unlabelled += item.label is None
            highest = highest if item.label is None else max(highest, item.label)
    count = len(offsets)
    if not count:
        raise UserError(f"the source {source.name!r} has no pictures", "check the folder and the file extensions")
    if highest >= 0 and unlabelled:
        raise UserError(f"{unlabelled} of {count} items have no label and the others do", _FIX)
    hash_array = np.frombuffer(hashes, dtype=np.uint64)
    val = np.frombuffer(bytes(own_val), dtype=np.bool_)
    if val_fraction or val_count:
        if val.any():
            what = f"the source {source.name!r} brings its own validation split of {int(val.sum())}"
            raise UserError(what, "drop --val-fraction and --val-count")
        val = _held_out(hash_array, val_fraction, val_count)
    if val.all():
        raise UserError(f"all {count} items are held out, none is left for training", "hold out fewer")
    items = ItemList(path, np.frombuffer(offsets, dtype=np.uint64), val, highest + 1, digest.hexdigest())
    _check_unique(items, hash_array)
    return items


@contextmanager
def _listing(source: Source, progress: bool) -> Iterator[Iterable[Item]]:
    """The source's items with a bar of their progress, and of the files found while a large folder is read."""
    with Bar(source.items(), unit="img", desc="listing", disable=not progress) as bar:
        if not hasattr(source, "tell"):
            yield bar
            return
        source.tell = lambda count: bar.set_postfix_str(f"{count:,} files in a folder so far")
        try:
            yield bar
        finally:
            source.tell = None  # sources are sent to workers, functions like this one cannot be


def _held_out(hashes: npt.NDArray[np.uint64], fraction: float, count: int) -> npt.NDArray[np.bool_]:
    if fraction:
        return hashes < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))
    val = np.zeros(len(hashes), dtype=np.bool_)
    val[np.argsort(hashes, kind="stable")[:count]] = True
    return val


def _check(item: Item) -> None:
    if not is_key(item.key):
        what = f"the key {item.key!r:.250} is not allowed: expected at most {MAX_KEY} of letters, digits, -, _ and /"
        raise UserError(what, _FIX)
    if len(item.key) > _ALWAYS_FITS:
        try:
            member_header(f"{item.key}.webp", 0)
        except ValueError:
            raise UserError(f"the key {item.key!r} is too long for a tar", _FIX) from None
    if item.split not in SPLITS:
        raise UserError(f"item {item.key!r} has split {item.split!r}, expected one of {', '.join(SPLITS)}", _FIX)
    if item.label is not None and not 0 <= item.label < MAX_CLASSES:
        raise UserError(f"item {item.key!r} has label {item.label}, expected 0 to {MAX_CLASSES - 1}", _FIX)


def _check_unique(items: ItemList, hashes: npt.NDArray[np.uint64]) -> None:
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    for place in same.tolist():
        first, second = read_items(items.path, items.offset[order[place : place + 2]])
        if first.key == second.key:
            raise UserError(f"the key {first.key!r} stands for two items", "give every item its own key")

"""A folder of pictures, sub-folders included, in order of name."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sivae_dist.data.decode import MAX_PIXELS, open_image
from sivae_dist.data.sources.base import Item, Recipe, file_bytes
from sivae_dist.data.sources.listing import Kind, SortedNames, Tell, entered, entries, kind_of, listed, visible
from sivae_dist.errors import UserError
from sivae_dist.files import expanded

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pnm"})
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_/-]+")
_LONGEST_PLAIN_KEY = 90  # with an extension this still fits a tar header whole


@dataclass
class FolderSource:
    """Every picture below `root`, by file extension; hidden files and folders are passed over.

    Links are followed, to folders too, but for those back to a folder on the way. One that leads to nothing is an item
    that cannot be opened, if its name is that of a picture or has no ending, as a folder's.
    labels: the first sub-folder of each picture is its class, numbered in order of name.
    """

    root: Path
    name: str = ""
    license: str = "unknown"
    labels: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        self.root = expanded(self.root)
        if not self.root.is_dir():
            raise UserError(f"{self.root} is no folder", "give the folder that holds the pictures")
        self.name = self.name or self.root.resolve().name
        self.tell: Tell | None = None  # told how many files a folder has so far, while it is read
        self._count: int | None = None
        self.class_names: tuple[str, ...] = ()
        if self.labels:
            folders = visible(self.root, wanted=lambda _: False).folders
            above = (os.path.realpath(self.root),)
            self.class_names = tuple(f for f in folders if _holds_pictures(self.root / f, above))
            if not self.class_names:
                raise UserError(f"{self.root} has no sub-folders with pictures to take labels from", "drop --labels")
        self._class = {name: number for number, name in enumerate(self.class_names)}

    def __len__(self) -> int:
        """How many pictures there are (walks the folder once)."""
        if self._count is None:
            self._count = sum(1 for _ in self.items())
        return self._count

    def items(self) -> Iterator[Item]:
        """All pictures, folder by folder, in order of name. Memory: the names of one folder's files, as bytes."""
        yield from self._walk("", ())

    def open(self, item: Item, resolution: int) -> Image.Image:
        """The picture, not yet decompressed. Raises UserError or OSError."""
        if item.meta.get("lost"):
            raise UserError("a link that leads to nothing", "mend or remove it")
        return open_image(file_bytes(self.root / str(item.meta["file"])), max_pixels=self.max_pixels)

    def _walk(self, prefix: str, above: tuple[str, ...]) -> Iterator[Item]:
        here = entered(self.root / prefix, above)
        if here is None:
            return
        found = visible(self.root / prefix, is_picture, self.tell)
        if self.labels and prefix:
            label: int | None = self._class.get(prefix.partition("/")[0])
        else:
            label = None
        shared = shared_stems(found.files)
        for file in found.files:
            path = prefix + file
            lost = file in found.lost
            if self.labels and label is None and lost:
                what = f"{self.root / path} is a link that leads to nothing: a class may be missing"
                raise UserError(what, "mend or remove it, or drop --labels")
            if self.labels and label is None:
                what = f"{self.root / path} lies in no sub-folder, so it has no label"
                raise UserError(what, "move it into the folder of its class, or drop --labels")
            stem = os.path.splitext(file)[0]
            meta: dict[str, object] = {"file": path, "lost": True} if lost else {"file": path}
            yield Item(safe_key(prefix + stem, path, unique=not shared(stem)), label=label, meta=meta)
        folders = found.folders
        del found, shared  # before the sub-folders' names are held
        for folder in folders:
            yield from self._walk(f"{prefix}{folder}/", here)


@dataclass(frozen=True)
class FolderRecipe(Recipe):
    """Any folder of pictures."""

    name: str = "folder"

    def build(self) -> FolderSource:
        """Checks that there is such a folder."""
        self.refuse("attribute", "partial")
        return FolderSource(self.root, name=self.title, license=self.license or "unknown", labels=self.labels)


def safe_key(name: str, path: str, *, unique: bool) -> str:
    """A key from a relative path without extension: itself if plain and unique, else made so by a hash of `path`."""
    plain = "/".join(_NOT_IN_KEYS.sub("_", part) for part in name.split("/"))
    if plain == name and unique and len(plain) <= _LONGEST_PLAIN_KEY:
        return plain
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
    return f"{plain[: _LONGEST_PLAIN_KEY - 13].rstrip('/')}-{digest}"


def is_picture(name: str) -> bool:
    """Whether a file is one, by its extension."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def shared_stems(files: SortedNames | list[str]) -> Callable[[str], bool]:
    """A function that tells whether several of the files have this name without extension: a.jpg beside a.png.

    Hashes of 64 bits stand for the names, so that millions take 8 bytes each; two that collide are taken for shared,
    which makes their keys longer and nothing else.
    """
    endings = {os.path.splitext(file)[1] for file in files} if isinstance(files, list) else files.endings
    if len(endings) <= 1:
        return lambda _: False
    hashes = np.sort(np.fromiter((_hash(os.path.splitext(file)[0]) for file in files), np.uint64))
    twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])

    def shared(stem: str) -> bool:
        value = np.uint64(_hash(stem))
        place = np.searchsorted(twice, value)
        return bool(place < len(twice) and twice[place] == value)

    return shared if len(twice) else lambda _: False


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "big")


def _holds_pictures(folder: Path, above: tuple[str, ...]) -> bool:
    here = entered(folder, above)
    if here is None:
        return False
    below = []
    for entry in entries(folder):
        kind = kind_of(entry)
        if kind is Kind.FOLDER:
            below.append(folder / entry.name)
        elif listed(entry.name, kind, is_picture):
            return True
    return any(_holds_pictures(path, here) for path in below)

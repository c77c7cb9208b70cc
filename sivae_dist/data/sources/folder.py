"""A folder of pictures, sub-folders included, in order of name."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from sivae_dist.data.decode import MAX_PIXELS, open_image
from sivae_dist.data.sources.base import Item, Recipe
from sivae_dist.errors import UserError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pnm"})
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_/-]+")
_LONGEST_PLAIN_KEY = 90  # with an extension this still fits a tar header whole


@dataclass
class FolderSource:
    """Every picture below `root`, by file extension; hidden files and folders are passed over, links to folders too.

    labels: the first sub-folder of each picture is its class, numbered in order of name.
    """

    root: Path
    name: str = ""
    license: str = "unknown"
    labels: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        self.root = Path(self.root).expanduser()
        if not self.root.is_dir():
            raise UserError(f"{self.root} is no folder", "give the folder that holds the pictures")
        self.name = self.name or self.root.resolve().name
        self._count: int | None = None
        self.class_names: tuple[str, ...] = ()
        if self.labels:
            self.class_names = tuple(f for f in visible(self.root)[0] if _holds_pictures(self.root / f))
            if not self.class_names:
                raise UserError(f"{self.root} has no sub-folders with pictures to take labels from", "drop --labels")

    def __len__(self) -> int:
        """How many pictures there are (walks the folder once)."""
        if self._count is None:
            self._count = sum(1 for _ in self.items())
        return self._count

    def items(self) -> Iterator[Item]:
        """All pictures, folder by folder, in order of name. Memory: one folder's listing."""
        yield from self._walk(PurePosixPath())

    def open(self, item: Item, resolution: int) -> Image.Image:
        """The picture, not yet decompressed. Raises UserError or OSError."""
        return open_image(self.root / str(item.meta["file"]), max_pixels=self.max_pixels)

    def _walk(self, relative: PurePosixPath) -> Iterator[Item]:
        folders, files = visible(self.root / relative)
        pictures = [f for f in files if os.path.splitext(f)[1].lower() in EXTENSIONS]
        keys = [str(relative / os.path.splitext(f)[0]) for f in pictures]
        shared = Counter(keys)  # a.jpg beside a.png
        for file, key in zip(pictures, keys, strict=True):
            path = str(relative / file)
            label = self._label(relative, path) if self.labels else None
            yield Item(safe_key(key, path, unique=shared[key] == 1), label=label, meta={"file": path})
        for folder in folders:
            yield from self._walk(relative / folder)

    def _label(self, relative: PurePosixPath, path: str) -> int:
        if not relative.parts:
            what = f"{self.root / path} lies in no sub-folder, so it has no label"
            raise UserError(what, "move it into the folder of its class, or drop --labels")
        return self.class_names.index(relative.parts[0])


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


def visible(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the sub-folders and files that are not hidden, sorted."""
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif entry.is_file():
                    files.append(entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}", "check the permissions") from None
    return sorted(folders), sorted(files)


def _holds_pictures(folder: Path) -> bool:
    folders, files = visible(folder)
    return any(os.path.splitext(f)[1].lower() in EXTENSIONS for f in files) or any(
        _holds_pictures(folder / f) for f in folders
    )

"""What a dataset on disk gives the packer: a list of items, and the pixels of each on demand.

One file in this folder per dataset. A source knows layout, splits and labels; it knows nothing of shards, formats or
resolutions, which belong to the packer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Protocol

from PIL import Image

from sivae_dist.errors import UserError

MAX_FILE_BYTES = 1 << 31  # twice that of the largest picture we take, uncompressed, with four channels of 16 bits


@dataclass(frozen=True)
class Item:
    """One image before it is read.

    key:   unique in the dataset, [A-Za-z0-9_/-] only, no dots (WebDataset splits member names at the first dot).
    split: "train" or "val".
    label: class index or None.
    meta:  JSON-able facts stored beside the image (the factors of a rendered scene, the original file name).
    """

    key: str
    split: str = "train"
    label: int | None = None
    meta: dict[str, object] = field(default_factory=dict)


class Source(Protocol):
    """A dataset to pack. Instances are sent to worker processes, so they must pickle (among our own processes)."""

    name: str
    license: str

    def __len__(self) -> int:
        """How many items `items()` gives."""
        ...

    def items(self) -> Iterator[Item]:
        """All items in a fixed order, without reading pixels."""
        ...

    def open(self, item: Item, resolution: int) -> Image.Image:
        """The picture. `resolution` is a hint: a renderer draws at it, a photograph ignores it and is resized later.

        Raises UserError, or OSError without a number (as Pillow does), when the picture is no good: the packer reports
        it and goes on. OSError with a number (errno) means that the source fails, and ends the packing: a disk that
        has gone must not turn good pictures into unreadable ones. So files are read before they are decoded, as by
        `file_bytes`: a decoder that reads for itself raises such errors on damaged pictures, too.
        """
        ...


def file_bytes(path: Path) -> bytes:
    """A picture's file, whole. Raises OSError where it cannot be read, UserError for more bytes than pictures have."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
            raise UserError(f"a file of more than {MAX_FILE_BYTES} bytes", "make it smaller or remove it")
        return file.read()


@dataclass(frozen=True)
class Recipe:
    """Base of what `sivae-dist data pack --recipe NAME` offers: one class a file of this folder, found by its `name`.

    name:      selects the class.
    root:      where the data set lies.
    title:     its name in the manifest; empty for the recipe's own.
    license:   its licence in the manifest; empty for the recipe's own.
    labels:    keep classes, where the data set has some.
    attribute: the one attribute that makes two classes, where pictures have several.
    partial:   take a published data set although pictures are missing.
    """

    name: str = ""
    root: Path = Path()
    title: str = ""
    license: str = ""
    labels: bool = False
    attribute: str = ""
    partial: bool = False

    def build(self) -> Source:
        """The source; looks at the data set. Raises UserError when it is not what was expected."""
        raise NotImplementedError

    def refuse(self, *options: str) -> None:
        """Raises UserError when one of these options is given, for recipes that have no use for them."""
        for option in options:
            if getattr(self, option) != next(f.default for f in fields(self) if f.name == option):
                raise UserError(f"--recipe {self.name} has no --{option}", f"drop --{option}")

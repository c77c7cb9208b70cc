"""What a dataset on disk gives the packer: a list of items, and the pixels of each on demand.

One file in this folder per dataset. A source knows layout, splits and labels; it knows nothing of shards, formats or
resolutions, which belong to the packer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Protocol

from PIL import Image

from sivae_dist.errors import UserError


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

        Raises UserError or OSError when the item cannot be read; the packer reports it and goes on.
        """
        ...


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

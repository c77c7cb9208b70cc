"""What a dataset on disk gives the packer: a list of items, and the pixels of each on demand.

One file in this folder per dataset. A source knows layout, splits and labels; it knows nothing of shards, formats or
resolutions, which belong to the packer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image


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

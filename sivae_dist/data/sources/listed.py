"""Another split for any source: the pictures that a text file names are held out, in place of the source's own split.

No dataset itself; `sivae-dist data pack --val-list FILE` puts it around one. Published splits are often such lists.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image

from sivae_dist.data.sources.base import Item, Source
from sivae_dist.data.sources.listing import Tell
from sivae_dist.errors import UserError
from sivae_dist.files import expanded

_LARGEST_LIST = 1 << 30


class ListedSplit:
    """`source` with the split of a list: one name a line, what follows a blank is passed over, and so are lines with #.

    A name is a picture's path in the source, its file name, either without extension, or its key. Each name must fit
    exactly one picture (UserError else, after the last item).
    """

    def __init__(self, source: Source, path: Path) -> None:
        self.source, self.path = source, expanded(path)
        self.name, self.license = source.name, source.license
        self.class_names: tuple[str, ...] = tuple(getattr(source, "class_names", ()))
        try:
            if self.path.stat().st_size > _LARGEST_LIST:
                raise UserError(f"{self.path} has more than {_LARGEST_LIST} bytes", "give a list of names")
            lines = self.path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}", "check --val-list") from None
        words = (line.split(maxsplit=1) for line in lines if not line.startswith("#"))
        self.names = frozenset(word[0] for word in words if word)
        if not self.names:
            raise UserError(f"{self.path} names no pictures", "give a file with one name a line, or drop --val-list")

    @property
    def tell(self) -> Tell | None:
        """As that of the source."""
        return getattr(self.source, "tell", None)

    @tell.setter
    def tell(self, value: Tell | None) -> None:
        if hasattr(self.source, "tell"):
            self.source.tell = value

    def __len__(self) -> int:
        """How many pictures the source has."""
        return len(self.source)

    def items(self) -> Iterator[Item]:
        """The source's items, those of the list with split "val", all others with "train"."""
        found: dict[str, str] = {}
        for item in self.source.items():
            fitting = _names_of(item) & self.names
            for name in fitting:
                if name in found:
                    what = f"{name!r:.200} of {self.path} fits two pictures, {found[name]} and {item.key}"
                    raise UserError(what, "give the path in the source instead of the file name")
                found[name] = item.key
            yield replace(item, split="val" if fitting else "train")
        if len(found) < len(self.names):
            lost = min(self.names - set(found))
            what = f"{len(self.names) - len(found):,} of {len(self.names):,} names of {self.path} fit no picture"
            raise UserError(f"{what}, for example {lost!r:.200}", "correct the list, or complete the source")

    def open(self, item: Item, resolution: int) -> Image.Image:
        """As the source."""
        return self.source.open(item, resolution)


def _names_of(item: Item) -> set[str]:
    path = str(item.meta.get("file", item.key))
    file = path.rpartition("/")[2]
    return {item.key, path, file, os.path.splitext(path)[0], os.path.splitext(file)[0]}

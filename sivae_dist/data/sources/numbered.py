"""Published sets of numbered pictures: which files there are, whether all are, and which are held out.

No dataset itself; FFHQ and CelebA-HQ are built on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from sivae_dist.data.decode import MAX_PIXELS, open_image
from sivae_dist.data.sources.base import Item, file_bytes
from sivae_dist.data.sources.listing import visible
from sivae_dist.errors import UserError

_LONGEST_HEADER = 1 << 16  # of a .npy file; ours have some 100 bytes


def find_numbered(folder: Path, pattern: re.Pattern[str], below: str | None = None) -> dict[int, str]:
    """{number: path relative to `folder`} of its pictures, in order of number.

    pattern: matches whole file names; its first group is the number. Other files are passed over. below: a regular
    expression for names of sub-folders to look into. Raises UserError when two pictures have one number, when one of
    them, or such a sub-folder, is a link that leads to nothing, or a folder cannot be listed.
    """

    def wanted(name: str) -> bool:
        return pattern.fullmatch(name) is not None

    found: dict[int, str] = {}
    top = visible(folder, wanted)
    inside = [name for name in top.folders if below and re.fullmatch(below, name)]
    lost = [folder / name for name in sorted(top.lost) if wanted(name) or (below and re.fullmatch(below, name))]
    for relative in ("", *inside):
        listing = visible(folder / relative, wanted) if relative else top
        lost += [folder / relative / name for name in sorted(listing.lost) if relative and wanted(name)]
        for name in listing.files:
            if match := pattern.fullmatch(name):
                path = f"{relative}/{name}" if relative else name
                other = found.setdefault(int(match[1]), path)
                if other != path:
                    what = f"{folder} has picture {int(match[1])} twice: {other} and {path}"
                    raise UserError(what, "keep one of them")
    if lost:
        what = f"{folder} has {len(lost)} links that lead to nothing, the first: {lost[0]}"
        raise UserError(what, "mend or remove them")
    return dict(sorted(found.items()))


def check_complete(numbers: Mapping[int, str], total: int, *, title: str, folder: Path, partial: bool) -> None:
    """Raises UserError when pictures of 0..total-1 are missing (unless `partial`) or there are others."""
    if numbers and max(numbers) >= total:
        what = f"{folder} has a picture {numbers[max(numbers)]}, but those of {title} end at {total - 1}"
        raise UserError(what, "remove what does not belong to it, or pack it with --recipe folder")
    if len(numbers) < total and not partial:
        first = next(n for n in range(total) if n not in numbers)
        what = f"{folder} has {len(numbers):,} of the {total:,} pictures of {title}; the first that is missing: {first}"
        raise UserError(what, "complete the download, or add --partial to pack what is there")


@dataclass
class NumberedSource:
    """Pictures of known numbers; keys are the numbers with five digits, whatever the files are called.

    files: {number: path relative to folder}; val: the numbers held out; label: {number: class} or empty; facts: what is
    stored beside a picture, for those that have some.
    """

    name: str
    license: str
    folder: Path
    files: Mapping[int, str]
    val: frozenset[int]
    label: Mapping[int, int] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    facts: Mapping[int, dict[str, object]] = field(default_factory=dict)
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.files)

    def items(self) -> Iterator[Item]:
        """All pictures in order of number."""
        for number, file in sorted(self.files.items()):
            split = "val" if number in self.val else "train"
            meta = {"file": file} | self.facts.get(number, {})
            yield Item(f"{number:05d}", split=split, label=self.label.get(number), meta=meta)

    def open(self, item: Item, resolution: int) -> Image.Image:
        """The picture. Raises UserError or OSError."""
        path = self.folder / str(item.meta["file"])
        if path.suffix == ".npy":
            return open_array(path, self.max_pixels)
        return open_image(file_bytes(path), max_pixels=self.max_pixels)


def open_array(path: Path, max_pixels: int) -> Image.Image:
    """A picture from a .npy file: bytes, (3, H, W) or (1, 3, H, W). Never unpickles. Raises UserError or OSError."""
    expected = "expected unsigned bytes of shape (1, 3, H, W) or (3, H, W)"
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file, max_header_size=_LONGEST_HEADER)
            channels, height, width = shape[-3:] if len(shape) in (3, 4) and set(shape[:-3]) <= {1} else (0, 0, 0)
            if channels != 3 or fortran or dtype != np.uint8:
                raise UserError(f"an array of {dtype} with shape {shape}, {expected}", "convert it")
            if not 0 < height * width <= max_pixels:
                raise UserError(
                    f"a picture of {width}x{height} pixels, more than the limit of {max_pixels}", "remove it"
                )
            data = file.read(3 * height * width + 1)
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:  # numpy's reader of headers raises ValueError, SyntaxError, TokenError, ...
        raise UserError(f"not a .npy file: {error}", expected) from None
    if len(data) != 3 * height * width:
        raise UserError(f"a .npy file with {len(data)} bytes of pixels, expected {3 * height * width}", "copy it again")
    return Image.fromarray(np.frombuffer(data, np.uint8).reshape(3, height, width).transpose(1, 2, 0).copy())

"""CelebA-HQ: 30,000 aligned faces of 1024x1024 pixels, in the forms in which it goes about.

imgHQ00000.npy ... imgHQ29999.npy (or .png): what the published recipe of CelebA-HQ makes.
CelebA-HQ-img/0.jpg ... 29999.jpg: CelebAMask-HQ, with CelebA-HQ-to-CelebA-mapping.txt and
CelebAMask-HQ-attribute-anno.txt.
data1024x1024/00001.jpg ... 30000.jpg (also data512x512, data256x256): converted; one more than the numbers above.
Which of the two numberings a folder has is told by its name, else by the names of its files (`_first_number`).

Split: the first 29,000 for training, the last 1,000 held out. So IntroVAE (section 4.1: "the first 29,000 images as the
training set and the rest 1,000 images as the testing set"), Soft-IntroVAE (configs/celeba-hq256.yaml: 29000 and 1000;
its residual code: 29000) and ALAE (its paper says 27,000, its author corrected it: podgorskiy/ALAE issue 31). Their
code takes the first 29,000 in the order of os.listdir, which differs from disk to disk; ours are the first by number.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from sivae_dist.data.sources.base import Recipe
from sivae_dist.data.sources.numbered import NumberedSource, check_complete, find_numbered
from sivae_dist.errors import UserError, nearest
from sivae_dist.files import expanded

TOTAL, TRAIN = 30_000, 29_000
LICENSE = "non-commercial research (CelebA's terms)"
MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"
ATTRIBUTES = "CelebAMask-HQ-attribute-anno.txt"
_FOLDERS = ("CelebA-HQ-img", "data1024x1024", "celeba-1024", "data512x512", "data256x256")
_NAME = re.compile(r"(?:imgHQ)?(\d{1,5})\.(?:npy|png|jpg|jpeg|webp)")
_FROM_ZERO = "CelebA-HQ-img"
_FROM_ONE = re.compile(r"data\d+x\d+|celeba-1024")


@dataclass(frozen=True)
class CelebaHqRecipe(Recipe):
    """CelebA-HQ with the split of the papers; attribute: makes classes of one of CelebA's 40 attributes."""

    name: str = "celebahq"

    def build(self) -> NumberedSource:
        """Finds the pictures and what is known of them. Raises UserError."""
        self.refuse("labels")
        root = expanded(self.root)
        folder = next((root / f for f in _FOLDERS if (root / f).is_dir()), root)
        files = find_numbered(folder, _NAME)
        if not files:
            what = (
                f"{root} is no CelebA-HQ: expected {TOTAL:,} pictures, imgHQ00000.npy (or .png) to imgHQ29999.npy, "
                f"CelebA-HQ-img/0.jpg to 29999.jpg, or data1024x1024/00001.jpg to 30000.jpg"
            )
            raise UserError(what, "give the folder that holds them")
        first = _first_number(files, folder)
        files = {number - first: file for number, file in files.items()}
        check_complete(files, TOTAL, title="CelebA-HQ", folder=folder, partial=self.partial)
        facts: dict[int, dict[str, object]] = {number: {} for number in files}
        for number, file in _originals(_beside(root, folder, MAPPING)).items():
            if number in facts:
                facts[number]["celeba"] = file
        names, attributes = _attributes(_beside(root, folder, ATTRIBUTES))
        for number, has in attributes.items():
            if number in facts:
                facts[number]["attributes"] = has
        label, class_names = self._classes(list(files), names, attributes, root)
        val = frozenset(n for n in files if n >= TRAIN)
        title, license = self.title or "celebahq", self.license or LICENSE
        return NumberedSource(title, license, folder, files, val, label, class_names, facts)

    def _classes(
        self, numbers: list[int], names: list[str], attributes: dict[int, list[str]], root: Path
    ) -> tuple[dict[int, int], tuple[str, ...]]:
        if not self.attribute:
            return {}, ()
        if not names:
            what = f"--attribute {self.attribute} needs {ATTRIBUTES}, which is not in {root}"
            raise UserError(what, "copy it there from CelebAMask-HQ, or drop --attribute")
        if self.attribute not in names:
            raise UserError(f"--attribute {self.attribute!r} is none of CelebA's", nearest(self.attribute, names))
        if without := [n for n in numbers if n not in attributes]:
            raise UserError(f"{ATTRIBUTES} has no line for picture {without[0]}", "copy the file again")
        label = {n: int(self.attribute in attributes[n]) for n in numbers}
        return label, (f"not {self.attribute}", self.attribute)


def _first_number(files: dict[int, str], folder: Path) -> int:
    """The number that the first of all pictures has in this form, be it there or not: 1 where 30000.jpg is the last.

    Raises UserError where nothing tells: five digits without a leading zero, as of a part from 10000 on, say nothing,
    and wrong numbers would mean other attributes, another split and another key for each picture.
    """
    names = [Path(file).name for file in files.values()]
    if 0 in files or any(name.startswith("imgHQ") for name in names):
        return 0
    if (title := Path(os.path.abspath(folder)).name) == _FROM_ZERO:
        return 0
    if _FROM_ONE.fullmatch(title) or TOTAL in files:
        return 1
    filled = any(name.startswith("0") for name in names)
    short = any(not name.startswith("0") and len(name.partition(".")[0]) < 5 for name in names)
    if filled == short:
        what = f"the names in {folder} do not tell whether CelebA-HQ's first picture is 0 or 1 there: {names[0]}, ..."
        fix = f"call the folder {_FROM_ZERO} if they go from 0 to {TOTAL - 1}, data1024x1024 if from 1 to {TOTAL}"
        raise UserError(what, fix)
    return int(filled)


def _beside(root: Path, folder: Path, name: str) -> list[str]:
    """The lines of a file in the root or beside the folder of pictures; none when there is no such file."""
    path = next((p for p in (root / name, folder.parent / name) if p.is_file()), None)
    return [] if path is None else path.read_text(encoding="utf-8", errors="replace").splitlines()


def _originals(lines: list[str]) -> dict[int, str]:
    """{number: file of CelebA} from lines `idx orig_idx orig_file`."""
    rows = [line.split() for line in lines]
    return {int(row[0]): row[2] for row in rows if len(row) == 3 and row[0].isdecimal()}


def _attributes(lines: list[str]) -> tuple[list[str], dict[int, list[str]]]:
    """(names, {number: those that the picture has}) from count, names, and lines `0.jpg -1 1 ...`."""
    if not lines:
        return [], {}
    names = lines[1].split() if len(lines) > 1 else []
    found: dict[int, list[str]] = {}
    for line in lines[2:]:
        file, *values = line.split() or [""]
        number = file.partition(".")[0]
        if not number.isdecimal() or len(values) != len(names) or not set(values) <= {"1", "-1"}:
            what = f"{ATTRIBUTES} has a line that is not understood: {line!r:.80}"
            raise UserError(what, f"expected a file name and {len(names)} times 1 or -1; copy the file again")
        found[int(number)] = [name for name, value in zip(names, values, strict=True) if value == "1"]
    return names, found

"""FFHQ: 70,000 aligned faces of 1024x1024 pixels, as https://github.com/NVlabs/ffhq-dataset publishes them.

ROOT/images1024x1024/00000/00000.png ... (or without the sub-folders, or ROOT is that folder), and beside it, if at
hand, ffhq-dataset-v2.json, which tells category, author and licence of each picture. Its categories are the published
split: the first 60,000 pictures for training, the last 10,000 for validation. Soft-IntroVAE's style networks were
trained on those 60,000 (configs/ffhq256.yaml, split_tfrecords_ffhq.py). Without the JSON we split by number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sivae_dist.data.sources.base import Recipe
from sivae_dist.data.sources.numbered import NumberedSource, check_complete, find_numbered
from sivae_dist.errors import UserError
from sivae_dist.files import expanded

TOTAL, TRAIN = 70_000, 60_000
LICENSE = "CC BY-NC-SA 4.0; each picture has the licence of its photograph (CC BY 2.0, CC BY-NC 2.0, or public domain)"
JSON = "ffhq-dataset-v2.json"
_PICTURES = "images1024x1024"
_NAME = re.compile(r"(\d{5})\.(?:png|jpg|jpeg|webp)")
_CATEGORIES = {"training": "train", "validation": "val"}
_KEPT = ("author", "license", "photo_url")  # what their licences ask to be named
_READ_AT_ONCE = 1 << 20
_LONGEST_ENTRY = 1 << 24  # characters; real ones have some 3,600
_BEFORE_VALUE = re.compile(r'\s*[{,]\s*"(\d{1,6})"\s*:\s*')
_END = re.compile(r"\s*(\{\s*)?\}\s*")


@dataclass(frozen=True)
class FfhqRecipe(Recipe):
    """FFHQ with its published split."""

    name: str = "ffhq"

    def build(self) -> NumberedSource:
        """Finds the pictures and reads the JSON. Raises UserError."""
        self.refuse("labels", "attribute")
        root = expanded(self.root)
        folder = root / _PICTURES if (root / _PICTURES).is_dir() else root
        files = find_numbered(folder, _NAME, below=r"\d{5}")
        if not files:
            what = (
                f"{root} is no FFHQ: expected {_PICTURES}/ with {TOTAL:,} pictures, 00000/00000.png to 69000/69999.png"
            )
            raise UserError(what, f"give the folder that holds {_PICTURES}/ (and {JSON}, if you have it)")
        check_complete(files, TOTAL, title="FFHQ", folder=folder, partial=self.partial)
        places = [p for p in (root / JSON, folder.parent / JSON) if p.is_file()]
        val, facts = _described(places[0], files, self.partial) if places else ({n for n in files if n >= TRAIN}, {})
        return NumberedSource(self.title or "ffhq", self.license or LICENSE, folder, files, frozenset(val), facts=facts)


def _described(path: Path, files: dict[int, str], partial: bool) -> tuple[set[int], dict[int, dict[str, object]]]:
    """(held-out numbers, facts by number) from the JSON; pictures it does not list are split by number if `partial`."""
    val, facts = set(), {}
    listed = 0
    for number, entry in _entries(path):
        category = entry.get("category")
        if category not in _CATEGORIES:
            what = f"{path} gives picture {number} the category {category!r:.80}, expected training or validation"
            raise UserError(what, f"download {JSON} again")
        if number not in files or number in facts:
            continue
        listed += 1
        if category == "validation":
            val.add(number)
        metadata = entry.get("metadata")
        about = metadata if isinstance(metadata, dict) else {}
        facts[number] = {key: about[key] for key in _KEPT if isinstance(about.get(key), str)}
    if listed < len(files) and not partial:
        first = next(n for n in files if n not in facts)
        what = f"{path} lists {listed:,} of the {len(files):,} pictures; the first that is missing: {first}"
        raise UserError(what, f"download {JSON} again, or remove it: without it the first {TRAIN:,} are for training")
    return val | {n for n in files if n not in facts and n >= TRAIN}, facts


def _entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The members of the JSON's one object, one after the other: the whole is 255 MB, and gigabytes once parsed."""
    decoder = json.JSONDecoder()
    with open(path, encoding="utf-8", errors="replace") as file:
        text, place, more = "", 0, True
        while True:
            value: Any = None
            match = _BEFORE_VALUE.match(text, place)
            if match:
                try:
                    value, after = decoder.raw_decode(text, match.end())
                except (ValueError, RecursionError):
                    value = None
            if match and isinstance(value, dict):
                yield int(match[1]), value
                place = after
                continue
            if more and len(text) - place < _LONGEST_ENTRY:
                data = file.read(_READ_AT_ONCE)
                text, place, more = text[place:] + data, 0, bool(data)
                continue
            if not _END.fullmatch(text, place):
                raise UserError(f"{path} is not as published: {text[place : place + 60]!r}", f"download {JSON} again")
            return

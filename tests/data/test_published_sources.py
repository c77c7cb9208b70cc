"""FFHQ and CelebA-HQ in the forms in which they are published, with few pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from drawn import picture
from PIL import Image

from sivae_dist.data.pack import pack
from sivae_dist.data.pack_shard import PackOptions
from sivae_dist.data.shard_read import ShardReader, load_manifest
from sivae_dist.data.sources import celebahq, ffhq
from sivae_dist.data.sources.base import Recipe
from sivae_dist.data.sources.celebahq import CelebaHqRecipe
from sivae_dist.data.sources.ffhq import FfhqRecipe
from sivae_dist.data.store import FolderStore
from sivae_dist.errors import UserError
from sivae_dist.registry import component, components


def save(path: Path, number: int, size: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, picture(number, size).transpose(2, 0, 1)[None])
    else:
        Image.fromarray(picture(number, size)).save(path)


def ffhq_entry(number: int, category: str) -> dict:
    return {
        "category": category,
        "metadata": {"photo_url": f"https://x/{number}", "author": "Zoë", "license": "CC BY", "country": "", "n": 3},
        "image": {"file_path": f"images1024x1024/{number:05d}.png", "face_landmarks": [[1.5, 2.5]] * 68},
        "in_the_wild": {"face_rect": [1, 2, 3, 4]},
    }


def draw_ffhq(root: Path, numbers, *, nested: bool = True) -> Path:
    for number in numbers:
        place = f"{number // 1000 * 1000:05d}/" if nested else ""
        save(root / "images1024x1024" / f"{place}{number:05d}.png", number)
        save(root / "thumbnails128x128" / f"{place}{number:05d}.png", number + 1)
    return root


def splits(source) -> dict[str, str]:
    return {item.key: item.split for item in source.items()}


def test_recipes_are_found_by_name():
    assert {"folder", "ffhq", "celebahq"} <= set(components("sivae_dist.data.sources", Recipe))
    with pytest.raises(UserError, match="did you mean 'ffhq'"):
        component("sivae_dist.data.sources", Recipe, "ffqh", kind="recipe")


@pytest.mark.parametrize("nested", [True, False])
def test_ffhq_by_number(tmp_path, nested):
    numbers = (0, 999, 1000, 59999, 60000, 69999)
    draw_ffhq(tmp_path, numbers, nested=nested)
    source = FfhqRecipe(root=tmp_path, partial=True).build()
    assert splits(source) == {f"{n:05d}": "val" if n >= 60000 else "train" for n in numbers}
    assert len(source) == 6
    for item in source.items():
        np.testing.assert_array_equal(np.asarray(source.open(item, 12)), picture(int(item.key), 12))
    inside = FfhqRecipe(root=tmp_path / "images1024x1024", partial=True).build()
    assert list(inside.items()) == list(source.items())


def test_ffhq_by_its_json(tmp_path, monkeypatch):
    monkeypatch.setattr(ffhq, "_READ_AT_ONCE", 700)  # entries lie across the borders of what is read at once
    draw_ffhq(tmp_path, range(5))
    about = {str(n): ffhq_entry(n, "validation" if n in (1, 4) else "training") for n in range(9)}
    for indent in (None, 2):
        (tmp_path / "ffhq-dataset-v2.json").write_text(json.dumps(about, indent=indent))
        source = FfhqRecipe(root=tmp_path, partial=True).build()
        assert [i.split for i in source.items()] == ["train", "val", "train", "train", "val"]
        item = next(source.items())
        assert item.meta == {
            "file": "00000/00000.png", "author": "Zoë", "license": "CC BY", "photo_url": "https://x/0",
        }  # fmt: skip


def test_ffhq_that_is_not_whole(tmp_path, monkeypatch):
    draw_ffhq(tmp_path, range(4))
    with pytest.raises(UserError, match=r"has 4 of the 70,000 pictures of FFHQ; the first that is missing: 4"):
        FfhqRecipe(root=tmp_path).build()
    monkeypatch.setattr(ffhq, "TOTAL", 4)
    monkeypatch.setattr(ffhq, "TRAIN", 3)
    assert list(splits(FfhqRecipe(root=tmp_path).build()).values()) == ["train", "train", "train", "val"]
    path = tmp_path / "ffhq-dataset-v2.json"
    path.write_text(json.dumps({str(n): ffhq_entry(n, "training") for n in range(3)}))
    with pytest.raises(UserError, match="lists 3 of the 4 pictures; the first that is missing: 3"):
        FfhqRecipe(root=tmp_path).build()
    assert list(splits(FfhqRecipe(root=tmp_path, partial=True).build()).values())[3] == "val"
    save(tmp_path / "images1024x1024" / "00004.png", 4)
    with pytest.raises(UserError, match=r"has a picture 00004\.png, but those of FFHQ end at 3"):
        FfhqRecipe(root=tmp_path, partial=True).build()
    save(tmp_path / "images1024x1024" / "00002.png", 4)
    with pytest.raises(UserError, match=r"has picture 2 twice: 00002\.png and 00000/00002\.png"):
        FfhqRecipe(root=tmp_path, partial=True).build()


def test_ffhq_behind_links(tmp_path):
    away = draw_ffhq(tmp_path / "away", (0, 1000)) / "images1024x1024"
    folder = tmp_path / "ffhq" / "images1024x1024"
    folder.mkdir(parents=True)
    (folder / "00000").symlink_to(away / "00000")
    (folder / "01000").mkdir()
    (folder / "01000" / "01000.png").symlink_to(away / "01000" / "01000.png")
    recipe = FfhqRecipe(root=tmp_path / "ffhq", partial=True)
    assert list(splits(recipe.build())) == ["00000", "01000"]
    for lost in ("02000", "01000/01001.png", "03000.png"):
        (folder / lost).symlink_to(tmp_path / "nowhere")
        with pytest.raises(UserError, match=rf"has 1 links that lead to nothing, the first: .*/{lost}"):
            recipe.build()
        (folder / lost).unlink()
    (folder / "README").symlink_to(tmp_path / "nowhere")
    assert len(recipe.build()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not as published"),
        ("[]", "not as published"),
        ('{"0": {"category": "training"}, "1": {"cat', "not as published"),
        ('{"0": 5}', "not as published"),
        ('{"0": {"category": "test"}}', "the category 'test', expected training or validation"),
        ("{" + '"0": {' * 100_000, "not as published"),
    ],
)
def test_ffhq_with_a_damaged_json(tmp_path, text, message):
    draw_ffhq(tmp_path, range(2))
    (tmp_path / "ffhq-dataset-v2.json").write_text(text)
    with pytest.raises(UserError, match=message):
        FfhqRecipe(root=tmp_path, partial=True).build()


def test_another_folder_is_no_ffhq_and_no_celebahq(tmp_path):
    save(tmp_path / "holiday.png", 1)
    with pytest.raises(UserError, match=r"is no FFHQ: expected images1024x1024/ with 70,000 pictures"):
        FfhqRecipe(root=tmp_path).build()
    with pytest.raises(UserError, match=r"is no CelebA-HQ: expected 30,000 pictures, imgHQ00000\.npy"):
        CelebaHqRecipe(root=tmp_path).build()
    with pytest.raises(UserError, match="cannot be listed: No such file"):
        FfhqRecipe(root=tmp_path / "none").build()
    for options in ({"labels": True}, {"attribute": "Male"}):
        with pytest.raises(UserError, match="--recipe ffhq has no --"):
            FfhqRecipe(root=tmp_path, **options).build()


@pytest.mark.parametrize(
    ("form", "first"),
    [
        ("imgHQ{:05d}.npy", 0),
        ("imgHQ{:05d}.png", 0),
        ("CelebA-HQ-img/{}.jpg", 0),
        ("data1024x1024/{:05d}.jpg", 1),
        ("data256x256/{:05d}.jpg", 1),
        ("{:05d}.png", 1),
        ("{:05d}.png", 0),
    ],
)
def test_celebahq_in_all_its_forms(tmp_path, form, first):
    numbers = (0, 7, 28999, 29000, 29999)
    for number in numbers:
        save(tmp_path / form.format(number + first), number)
    source = CelebaHqRecipe(root=tmp_path, partial=True).build()
    assert splits(source) == {f"{n:05d}": "val" if n >= 29000 else "train" for n in numbers}
    for item in source.items():
        if not form.endswith("jpg"):
            np.testing.assert_array_equal(np.asarray(source.open(item, 12)), picture(int(item.key), 12))
        else:
            assert abs(np.asarray(source.open(item, 12)).mean() - picture(int(item.key), 12).mean()) < 2
    with pytest.raises(UserError, match="has 5 of the 30,000 pictures of CelebA-HQ; the first that is missing: 1"):
        CelebaHqRecipe(root=tmp_path).build()


@pytest.mark.parametrize(
    ("place", "names", "keys"),
    [
        ("CelebA-HQ-img", ("29000.jpg", "29999.jpg"), ("29000", "29999")),
        ("CelebA-HQ-img", ("10000.jpg",), ("10000",)),
        ("data1024x1024", ("10000.jpg", "29001.jpg"), ("09999", "29000")),
        ("data128x128", ("29001.jpg",), ("29000",)),
        ("celeba-1024", ("29001.jpg",), ("29000",)),
        ("data1024x1024", ("00000.jpg", "29000.jpg"), ("00000", "29000")),  # no numbering from 1 has a 0
        ("faces", ("imgHQ29000.png",), ("29000",)),
        ("faces", ("00007.png", "29001.png"), ("00006", "29000")),
        ("faces", ("7.png", "29000.png"), ("00007", "29000")),
        ("faces", ("29001.png", "30000.png"), ("29000", "29999")),
        ("faces", ("29000.png", "29999.png"), None),
        ("faces", ("7.png", "00008.png"), None),
    ],
)
@pytest.mark.parametrize("inside", [False, True], ids=["root", "folder"])
def test_celebahq_in_part_keeps_its_numbers(tmp_path, place, names, keys, inside):
    for number, name in enumerate(names):
        save(tmp_path / place / name, number)
    known = place in celebahq._FOLDERS and not inside
    recipe = CelebaHqRecipe(root=tmp_path if known else tmp_path / place, partial=True)
    if keys is None:
        with pytest.raises(UserError, match="do not tell whether CelebA-HQ's first picture is 0 or 1") as raised:
            recipe.build()
        for title, first in (("CelebA-HQ-img", 0), ("data1024x1024", 1)):
            assert title in raised.value.fix
            link = tmp_path / str(first) / title
            link.parent.mkdir()
            link.symlink_to(tmp_path / place)  # either way to say it
            numbers = [int(key) for key in splits(CelebaHqRecipe(root=link.parent, partial=True).build())]
            assert numbers == sorted(int(name.partition(".")[0]) - first for name in names)
    else:
        assert splits(recipe.build()) == {key: "val" if int(key) >= 29000 else "train" for key in keys}


def annotated(root: Path, attributes=("5_o_Clock_Shadow", "Male", "Smiling")) -> Path:
    for number in range(4):
        save(root / "CelebA-HQ-img" / f"{number}.jpg", number)
    rows = [f"{n}.jpg  {' '.join('1' if (n >> bit) & 1 else '-1' for bit in range(len(attributes)))}" for n in range(4)]
    (root / celebahq.ATTRIBUTES).write_text("\n".join(["30000", " ".join(attributes), *rows]) + "\n")
    mapping = ["idx     orig_idx    orig_file", *(f"{n}       {119613 + n}  {119614 + n}.jpg" for n in range(4))]
    (root / celebahq.MAPPING).write_text("\n".join(mapping) + "\n")
    return root


def test_celebamask_attributes_and_originals(tmp_path):
    annotated(tmp_path)
    source = CelebaHqRecipe(root=tmp_path, partial=True).build()
    items = list(source.items())
    assert items[3].meta == {"file": "3.jpg", "celeba": "119617.jpg", "attributes": ["5_o_Clock_Shadow", "Male"]}
    assert all(item.label is None for item in items)
    source = CelebaHqRecipe(root=tmp_path, partial=True, attribute="Male").build()
    assert [item.label for item in source.items()] == [0, 0, 1, 1]
    assert source.class_names == ("not Male", "Male")
    pack(source, tmp_path / "out", PackOptions(8, format="png"), workers=1, progress=False)
    store = FolderStore(tmp_path / "out")
    manifest = load_manifest(store)
    assert (manifest.classes, manifest.class_names) == (2, ("not Male", "Male"))
    samples = [ShardReader(store, manifest, manifest.shards).read(0, n) for n in range(4)]
    assert {s.key: s.label for s in samples} == {"00000": 0, "00001": 0, "00002": 1, "00003": 1}


def test_celebahq_attributes_that_are_not_there(tmp_path):
    annotated(tmp_path)
    with pytest.raises(UserError, match="did you mean 'Smiling'"):
        CelebaHqRecipe(root=tmp_path, partial=True, attribute="Smilin").build()
    save(tmp_path / "CelebA-HQ-img" / "9.jpg", 9)
    with pytest.raises(UserError, match="has no line for picture 9"):
        CelebaHqRecipe(root=tmp_path, partial=True, attribute="Male").build()
    path = tmp_path / celebahq.ATTRIBUTES
    path.write_text(path.read_text() + "9.jpg 1 1\n")
    with pytest.raises(UserError, match=r"line that is not understood: '9\.jpg 1 1'"):
        CelebaHqRecipe(root=tmp_path, partial=True).build()
    path.unlink()
    with pytest.raises(UserError, match="--attribute Male needs CelebAMask-HQ-attribute-anno"):
        CelebaHqRecipe(root=tmp_path, partial=True, attribute="Male").build()


def test_arrays_that_are_no_pictures_are_skipped(tmp_path):
    for number in range(9):
        save(tmp_path / f"imgHQ{number:05d}.npy", number)
    np.save(tmp_path / "imgHQ00001.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "imgHQ00002.npy", np.zeros((1, 3, 4, 4), np.float32))
    np.save(tmp_path / "imgHQ00003.npy", np.zeros((2, 3, 4, 4), np.uint8))
    whole = (tmp_path / "imgHQ00004.npy").read_bytes()
    (tmp_path / "imgHQ00004.npy").write_bytes(whole[:-1])
    (tmp_path / "imgHQ00005.npy").write_bytes(b"no")
    (tmp_path / "imgHQ00006.npy").write_bytes(whole[:100].replace(b"12, 12", b"999999999, 999999999") + whole[100:])
    (tmp_path / "imgHQ00007.npy").write_bytes(whole.replace(b"(1, 3, 12, 12)", b"(3, 9000, 9000"))
    report = pack(
        CelebaHqRecipe(root=tmp_path, partial=True).build(),
        tmp_path / "out",
        PackOptions(8, format="png"),
        workers=1,
        progress=False,
    )
    reasons = dict(report.skipped)
    assert set(reasons) == {f"{n:05d}" for n in range(1, 8)}
    assert "an array of object" in reasons["00001"]
    assert "an array of float32" in reasons["00002"]
    assert "shape (2, 3, 4, 4)" in reasons["00003"]
    assert "431 bytes of pixels, expected 432" in reasons["00004"]
    assert "not a .npy file" in reasons["00005"]
    assert "a picture of 999999999x999999999 pixels, more than the limit" in reasons["00006"]
    assert "not a .npy file" in reasons["00007"]
    assert report.manifest.splits()["train"]["samples"] == 2

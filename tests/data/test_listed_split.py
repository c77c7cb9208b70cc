"""Splits that come as a list of names."""

from __future__ import annotations

import pytest
from drawn import draw_folder, picture, png

from sivae_dist.data.pack import pack
from sivae_dist.data.pack_shard import PackOptions
from sivae_dist.data.sources.folder import FolderSource
from sivae_dist.data.sources.listed import ListedSplit
from sivae_dist.errors import UserError


def split(source, path, text) -> list[str]:
    path.write_text(text)
    return [item.meta["file"] for item in ListedSplit(source, path).items() if item.split == "val"]


@pytest.fixture
def source(tmp_path):
    raw = draw_folder(tmp_path / "raw", 6, classes=2)
    (raw / "a b.png").write_bytes(png(picture(9)))
    return FolderSource(raw, labels=False)


@pytest.mark.parametrize("form", ["{}.png", "{}", "class1/{}.png", "class1/{}", "  {}.png  0 1 -1"])
def test_names_in_any_form(tmp_path, source, form):
    text = "# held out\n\n" + "".join(f"{form.format(n)}\r\n" for n in ("0001", "0005"))
    assert split(source, tmp_path / "val.txt", text) == ["class1/0001.png", "class1/0005.png"]


def test_it_packs_and_goes_on_with_the_same_split(tmp_path, source):
    (tmp_path / "val.txt").write_text("0001\n0002\n")
    options = PackOptions(8, format="png")
    listed = ListedSplit(source, tmp_path / "val.txt")
    assert len(listed) == 7
    report = pack(listed, tmp_path / "out", options, workers=3, progress=False)
    assert {k: v["samples"] for k, v in report.manifest.splits().items()} == {"train": 5, "val": 2}
    (tmp_path / "val.txt").write_text("0001\n")
    with pytest.raises(UserError, match="the pictures in the source"):
        pack(ListedSplit(source, tmp_path / "val.txt"), tmp_path / "out", options, workers=1, progress=False)
    with pytest.raises(UserError, match="its own validation split of 1"):
        options = PackOptions(8, val_count=1)
        pack(ListedSplit(source, tmp_path / "val.txt"), tmp_path / "b", options, workers=1, progress=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0001\n0077.png\n0078\n", r"2 of 3 names of .*val\.txt fit no picture, for example '0077\.png'"),
        ("# nothing\n", "names no pictures"),
        ("0000.png\n", "'0000.png' of .* fits two pictures, class0/0000 and class1/0000"),
        ("../raw/class0/0000.png\n", "fit no picture"),
    ],
)
def test_lists_that_do_not_fit(tmp_path, source, text, message):
    (source.root / "class1" / "0000.png").write_bytes(png(picture(1)))
    with pytest.raises(UserError, match=message):
        split(source, tmp_path / "val.txt", text)


def test_a_list_that_is_not_there(tmp_path, source):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        ListedSplit(source, tmp_path / "none.txt")

"""Folders of pictures as a source."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from drawn import draw_folder, picture
from PIL import Image

from sivae_dist.data.manifest import is_key
from sivae_dist.data.pack import pack
from sivae_dist.data.pack_shard import PackOptions
from sivae_dist.data.sources import listing
from sivae_dist.data.sources.folder import FolderSource
from sivae_dist.errors import UserError


def test_pictures_are_found_in_order_of_name(tmp_path):
    for name in ("b/2.png", "b/10.JPG", "a/x.webp", "z.png", "a/deep/er/1.jpeg", ".hidden.png", ".git/1.png", "t.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    source = FolderSource(tmp_path)
    assert [i.key for i in source.items()] == ["z", "a/x", "a/deep/er/1", "b/10", "b/2"]
    assert len(source) == 5
    assert source.name == tmp_path.name
    assert all(i.label is None for i in source.items())


def test_odd_names_get_unique_safe_keys(tmp_path):
    names = [
        "a b.png",
        "a_b.png",
        "a.b.png",
        "a.png",
        "a.jpg",
        "é.png",
        "x" * 120 + ".png",
        "x" * 121 + ".png",
        "-.png",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / os.fsdecode(b"\xff\xfe.png")).write_bytes(b"")
    keys = [i.key for i in FolderSource(tmp_path).items()]
    assert len(set(keys)) == len(keys) == len(names) + 1
    assert all(is_key(k) for k in keys)
    assert "a_b" in keys
    assert "a" not in keys, "a.png and a.jpg would share it"
    assert keys == [i.key for i in FolderSource(tmp_path).items()]


def test_labels_are_the_first_sub_folder(tmp_path):
    draw_folder(tmp_path / "cat", 2)
    draw_folder(tmp_path / "dog" / "big", 2)
    (tmp_path / "empty").mkdir()
    source = FolderSource(tmp_path, labels=True)
    assert source.class_names == ("cat", "dog")
    assert [(i.key, i.label) for i in source.items()] == [
        ("cat/0000", 0), ("cat/0001", 0), ("dog/big/0000", 1), ("dog/big/0001", 1),
    ]  # fmt: skip
    draw_folder(tmp_path, 1)
    with pytest.raises(UserError, match=r"0000\.png lies in no sub-folder"):
        list(source.items())


def test_links_are_followed_and_lost_ones_are_said(tmp_path):
    root, away = tmp_path / "root", tmp_path / "away"
    draw_folder(root / "a", 1)
    draw_folder(away / "deep", 2)
    (root / "b").symlink_to(away)
    (root / "c.png").symlink_to(away / "deep" / "0001.png")
    (root / "gone.png").symlink_to(away / "none.png")
    (root / "circle.png").symlink_to("circle.png")
    (root / "through.png").symlink_to(away / "deep" / "0001.png" / "x")
    (root / "disk").symlink_to("/nowhere/pictures")  # by its name a folder
    (root / "notes.txt").symlink_to("/nowhere/notes.txt")
    (root / "a" / "back").symlink_to(root)
    (away / "self").symlink_to(away)
    (away / "deep" / "up").symlink_to(away)
    source = FolderSource(root)
    assert [item.key for item in source.items()] == [
        "c", "circle", "disk", "gone", "through", "a/0000", "b/deep/0000", "b/deep/0001",
    ]  # fmt: skip
    report = pack(source, tmp_path / "out", PackOptions(8), workers=1, progress=False)
    nothing = "a link that leads to nothing"
    assert dict(report.skipped) == dict.fromkeys(["circle", "disk", "gone", "through"], nothing)
    assert report.manifest.splits()["train"]["samples"] == 4
    (root / "around").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"around is a link to .*, which holds .*root itself"):
        list(source.items())


def test_a_linked_class_is_one_and_a_lost_one_is_an_error(tmp_path):
    root = draw_folder(tmp_path / "root" / "ant", 1).parent
    draw_folder(tmp_path / "elsewhere" / "1", 1)
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "0.png").symlink_to("/nowhere.png")
    (root / "bee").symlink_to(tmp_path / "elsewhere")
    (root / "cat").symlink_to(tmp_path / "hidden")
    (root / "self").symlink_to(".")
    (root / "bee" / "back").symlink_to(root)
    source = FolderSource(root, labels=True)
    assert source.class_names == ("ant", "bee", "cat")
    assert [(item.key, item.label) for item in source.items()] == [("ant/0000", 0), ("bee/1/0000", 1), ("cat/0", 2)]
    (root / "dog").symlink_to("/nowhere/dog")
    with pytest.raises(UserError, match=r"root/dog is a link that leads to nothing: a class may be missing"):
        list(FolderSource(root, labels=True).items())


def test_a_link_of_which_the_system_says_nothing_is_an_error(tmp_path, monkeypatch):
    draw_folder(tmp_path / "away", 1)
    (tmp_path / "link.png").symlink_to(tmp_path / "away" / "0000.png")
    real = os.stat

    def stale(path, *arguments, **options):
        if str(path).endswith("link.png"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path, *arguments, **options)

    monkeypatch.setattr(listing.os, "stat", stale)
    with pytest.raises(UserError, match=r"link\.png cannot be looked at: Stale file handle"):
        list(FolderSource(tmp_path).items())


def test_the_picture_is_opened_by_its_file_name(tmp_path):
    (tmp_path / "a b").mkdir()
    Image.fromarray(picture(5)).save(tmp_path / "a b" / "c.d.png")
    source = FolderSource(tmp_path)
    (item,) = source.items()
    with source.open(item, 8) as image:
        np.testing.assert_array_equal(np.asarray(image), picture(5))


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        FolderSource(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no sub-folders with pictures"):
        FolderSource(draw_folder(tmp_path, 1), labels=True)

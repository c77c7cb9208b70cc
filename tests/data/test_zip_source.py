"""Zips of pictures as a source: read in place, and not to be fooled."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from drawn import draw_folder, files, picture, png

from sivae_dist.data.manifest import FILE_NAME, is_key
from sivae_dist.data.pack import pack
from sivae_dist.data.pack_shard import PackOptions
from sivae_dist.data.sources import zipped
from sivae_dist.data.sources.base import Item
from sivae_dist.data.sources.folder import FolderSource
from sivae_dist.data.sources.zipped import ZipSource
from sivae_dist.errors import UserError


def packed_quietly(source, destination, options, workers=1):
    return pack(source, destination, options, workers=workers, progress=False)


def make_zip(path: Path, members: dict[str, bytes], method=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_it_packs_to_the_same_shards_as_the_folder(tmp_path, method):
    raw = draw_folder(tmp_path / "raw", 12)
    path = make_zip(tmp_path / "raw.zip", {p.name: p.read_bytes() for p in raw.iterdir()}, method)
    options = PackOptions((8, 16), format="png", shard_size="5", val_count=2)
    packed_quietly(FolderSource(raw), tmp_path / "a", options)
    packed_quietly(ZipSource(path), tmp_path / "b", options, workers=3)
    for level in ("8", "16"):
        first, second = files(tmp_path / "a" / level), files(tmp_path / "b" / level)
        assert first.pop(FILE_NAME) == second.pop(FILE_NAME)
        assert first == second


def test_names_are_never_paths(tmp_path):
    names = [
        "../../evil.png", "/etc/evil.png", "a/../b.png", "a//b.png", "./c.png", "C:\\evil.png", "..png", "d.png",
        "d.jpg", "é/ü.png", "x" * 300 + ".png",
    ]  # fmt: skip
    hidden = {".a.png": b"", "__MACOSX/._d.png": b"", "a/.b/c.png": b"", "readme.txt": b"", "folder.png/": b""}
    path = make_zip(tmp_path / "z.zip", {name: png(picture(n)) for n, name in enumerate(names)} | hidden)
    source = ZipSource(path)
    items = list(source.items())
    assert sorted(i.meta["file"] for i in items) == sorted(n for n in names if not n.startswith("..png"))
    keys = [i.key for i in items]
    assert len(set(keys)) == len(keys)
    assert all(is_key(key) for key in keys)
    for item in items:
        expected = picture(names.index(str(item.meta["file"])))
        np.testing.assert_array_equal(np.asarray(source.open(item, 8)), expected)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    report = packed_quietly(source, tmp_path / "out", PackOptions(8))
    assert not report.skipped
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_labels_are_the_first_sub_folder_or_those_of_dataset_json(tmp_path):
    members = {f"{folder}/{n}.png": png(picture(n)) for n, folder in enumerate(["b", "a", "b/deep"])}
    source = ZipSource(make_zip(tmp_path / "a.zip", members), labels=True)
    assert source.class_names == ("a", "b")
    assert [(i.key, i.label) for i in source.items()] == [("a/1", 0), ("b/0", 1), ("b/deep/2", 1)]
    none = json.dumps({"labels": None}).encode()
    assert list(ZipSource(make_zip(tmp_path / "b.zip", members | {"dataset.json": none}), labels=True).items()) == list(
        source.items()
    )
    theirs = json.dumps({"labels": [[name, 5 + n] for n, name in enumerate(members)]}).encode()
    path = make_zip(tmp_path / "c.zip", members | {"dataset.json": theirs})
    source = ZipSource(path, labels=True)
    assert {i.meta["file"]: i.label for i in source.items()} == {name: 5 + n for n, name in enumerate(members)}
    assert all(i.label is None for i in ZipSource(path).items())
    assert packed_quietly(source, tmp_path / "out", PackOptions(8)).manifest.classes == 8


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (b"{", "is not valid JSON"),
        (b'{"labels": [["a/0.png", 0.5]]}', "labels that are not understood"),
        (b'{"labels": [["a/0.png", [1, 2]]]}', "labels that are not understood"),
        (b'{"labels": {}}', "labels that are not understood"),
        (b'{"labels": [["other.png", 1]]}', "has no label for 'a/0.png'"),
        (None, "'0.png' in .* lies in no sub-folder"),
    ],
)
def test_labels_that_are_not_there(tmp_path, labels, text):
    members = {"0.png": b""} if labels is None else {"a/0.png": b"", "dataset.json": labels}
    with pytest.raises(UserError, match=text):
        ZipSource(make_zip(tmp_path / "a.zip", members), labels=True)


def patched(path: Path, name: str, field: int, form: str, value: int) -> None:
    """Overwrites a field of a member's entry in the directory of the archive."""
    data = bytearray(path.read_bytes())
    place = data.index(name.encode(), data.index(b"PK\x01\x02")) - 46
    struct.pack_into(form, data, place + field, value)
    path.write_bytes(data)


def spoiled(path: Path, name: bytes, at: int) -> None:
    """Turns bytes of a member's packed data."""
    data = bytearray(path.read_bytes())
    begin = data.index(name) + len(name) + at
    data[begin : begin + 8] = b"\xff" * 8
    path.write_bytes(data)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_labels_that_cannot_be_unpacked(tmp_path, method):
    labels = json.dumps({"labels": [["a/0.png", 1]], "more": list(range(300))}).encode()
    members = {"a/0.png": b"", "dataset.json": labels}
    path = make_zip(tmp_path / "a.zip", members, method)
    assert [i.label for i in ZipSource(path, labels=True).items()] == [1]
    patched(path, "dataset.json", 8, "<H", 1)
    with pytest.raises(UserError, match=r"dataset\.json in .*a\.zip cannot be unpacked: .*encrypted"):
        ZipSource(path, labels=True)
    spoiled(make_zip(path, members, method), b"dataset.json", 16)
    with pytest.raises(UserError, match=r"dataset\.json in .*a\.zip cannot be unpacked: \w"):
        ZipSource(path, labels=True)
    assert len(ZipSource(path)) == 1


def test_bombs_and_damage_are_skipped_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(zipped, "MAX_MEMBER_BYTES", 1 << 20)
    names = ["bomb", "cut", "encrypted", "large", "liar", "lzma", "other", "wrong"]
    members = {f"{n}.png": png(picture(k)) for k, n in enumerate(names)} | {"good.png": png(picture(9))}
    members |= {"large.png": bytes(3 << 20), "liar.png": bytes(900_000)}
    path = make_zip(tmp_path / "z.zip", members, zipfile.ZIP_DEFLATED)
    patched(path, "bomb.png", 24, "<I", 1 << 30)
    patched(path, "cut.png", 24, "<I", 100)
    patched(path, "encrypted.png", 8, "<H", 1)
    patched(path, "liar.png", 24, "<I", 10)
    patched(path, "lzma.png", 10, "<H", 14)
    patched(path, "wrong.png", 16, "<I", 1)
    data = bytearray(path.read_bytes())
    place = data.index(b"other.png")
    data[place - 30 : place - 26] = b"nono"
    path.write_bytes(data)
    asked = []
    real = zlib.decompressobj

    class Watched:
        def __init__(self, *arguments):
            self._real = real(*arguments)

        def decompress(self, data, limit):
            asked.append(limit)
            return self._real.decompress(data, limit)

    monkeypatch.setattr(zipped.zlib, "decompressobj", Watched)
    report = packed_quietly(ZipSource(path), tmp_path / "out", PackOptions(8))
    reasons = dict(report.skipped)
    assert set(reasons) == set(names)
    assert reasons["bomb"] == "1073741824 bytes, more than the limit of 1048576"
    assert reasons["large"] == "3145728 bytes, more than the limit of 1048576"
    for name in ("cut", "liar", "wrong"):
        assert reasons[name] == "damaged in the zip: size or checksum differ"
    assert reasons["encrypted"] == "encrypted"
    assert "packed with method 14, expected stored or deflated" in reasons["lzma"]
    assert "not where the directory of the zip says" in reasons["other"]
    assert all(0 < limit <= 10_000 for limit in asked), "never more is unpacked than the directory announces"
    assert report.manifest.splits()["train"]["samples"] == 1


def test_archives_that_are_refused(tmp_path, monkeypatch):
    good = make_zip(tmp_path / "good.zip", {f"{n}.png": png(picture(n)) for n in range(4)})
    data = good.read_bytes()
    (tmp_path / "cut.zip").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.zip").write_text("no zip")
    named = make_zip(tmp_path / "named.zip", {"é.png": b""}).read_bytes()
    (tmp_path / "named.zip").write_bytes(named.replace("é".encode(), b"\xff\xfe"))  # said to be UTF-8
    for name in ("cut.zip", "text.zip", "named.zip"):
        with pytest.raises(UserError, match="is no readable zip"):
            ZipSource(tmp_path / name)
    with pytest.raises(UserError, match="No such file"):
        ZipSource(tmp_path / "none.zip")
    with pytest.raises(UserError, match="Is a directory"):
        ZipSource(tmp_path)
    (tmp_path / "same.zip").write_bytes(data.replace(b"1.png", b"2.png"))
    with pytest.raises(UserError, match=r"has two members '2\.png'"):
        ZipSource(tmp_path / "same.zip")
    (tmp_path / "inside.zip").write_bytes(data)
    patched(tmp_path / "inside.zip", "2.png", 42, "<I", 40)
    with pytest.raises(UserError, match="members that lie inside one another"):
        ZipSource(tmp_path / "inside.zip")
    monkeypatch.setattr(zipped, "MAX_MEMBERS", 3)
    with pytest.raises(UserError, match="has 4 members, more than 3"):
        ZipSource(good)


def test_an_archive_cut_off_after_its_directory_was_read(tmp_path):
    path = make_zip(tmp_path / "a.zip", {f"{n}.png": png(picture(n)) for n in range(4)})
    source = ZipSource(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="cut off in the zip"):
        source.open(Item("3", meta={"file": "3.png"}), 8)


READ: dict[str, ZipSource] = {}


@pytest.mark.dist
def test_processes_read_one_archive_at_a_time(tmp_path):
    path = make_zip(tmp_path / "a.zip", {f"{n:03d}.png": png(picture(n)) for n in range(40)})
    source = READ["a"] = ZipSource(path)
    items = list(source.items())
    source.open(items[3], 8).load()
    assert os.lseek(source._descriptor, 0, os.SEEK_CUR) == 0, "processes that inherit the open file share its place"
    assert pickle.loads(pickle.dumps(source))._names == source._names
    with multiprocessing.get_context("fork").Pool(3) as pool:
        means = pool.map(mean_colour, items * 5, chunksize=1)
    assert means == [float(picture(int(i.key)).mean()) for i in items * 5]


def mean_colour(item) -> float:
    return float(np.asarray(READ["a"].open(item, 8)).mean())

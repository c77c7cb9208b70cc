"""Damaged and hostile shard folders: every fault is a UserError that says where, and `verify` finds it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from drawn import craft, edit_manifest, picture, png
from PIL import Image

from sivae_dist.data import verify as verifying
from sivae_dist.data.loader import ShardsConfig
from sivae_dist.data.manifest import FILE_NAME, Manifest
from sivae_dist.data.shard_read import ShardReader, load_index, load_manifest
from sivae_dist.data.shard_write import ShardWriter
from sivae_dist.data.store import FolderStore, open_store
from sivae_dist.data.verify import verify
from sivae_dist.errors import UserError


@pytest.fixture
def folder(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "copy")


def read_everything(folder, workers=0):
    stream = ShardsConfig(url=str(folder), workers=workers, lanes=4).build(seed=0, salt=0, rank=0, ranks=1)
    try:
        batches = stream.batches(0, 8)
        return [next(batches) for _ in range(-(-stream.epoch_size // 8))]
    finally:
        stream.close()


def expect(folder, text, *, problem=None, workers=0):
    """Reading fails with `text`, and verify reports `problem` (by default the same)."""
    with pytest.raises(UserError, match=text) as caught:
        read_everything(folder, workers)
    assert caught.value.fix
    problems = verify(str(folder), workers=1, progress=False).problems
    assert any(re.search(problem or text, p) for p in problems), problems


def flip_byte(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(bytes(data))


def test_a_good_folder_reads_and_verifies(folder):
    read_everything(folder)
    report = verify(str(folder), workers=2, progress=False)
    assert (report.problems, report.damaged, report.decoded) == ((), (), 41)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flipped_bit_names_shard_and_key(folder, workers):
    path = folder / "shard-000002.tar"
    offset = json.loads((folder / "shard-000002.index").read_text().splitlines()[3])[1]
    key = json.loads((folder / "shard-000002.index").read_text().splitlines()[3])[0]
    flip_byte(path, offset + 60)
    expect(folder, rf"shard-000002\.tar: sample '{key}' is damaged: its checksum differs", workers=workers)
    report = verify(str(folder), workers=1, progress=False)
    assert report.damaged == ("shard-000002",)
    assert report.decoded == 40
    assert any("sha256 of the tar differs" in p for p in report.problems)


def test_damage_outside_the_pictures_is_found_by_verify(folder):
    flip_byte(folder / "shard-000000.tar", 100)  # the mode in the first header
    read_everything(folder)
    problems = verify(str(folder), workers=1, progress=False).problems
    assert any("sha256 of the tar differs" in p for p in problems)
    assert any("is no tar from byte 0" in p for p in problems)


def test_a_truncated_tar(folder):
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    expect(folder, r"shard-000001\.tar is truncated: 5000 bytes, the manifest says")


def test_a_missing_shard_and_a_missing_index(folder):
    (folder / "shard-000001.tar").unlink()
    expect(folder, r"shard-000001\.tar is missing")
    (folder / "shard-000000.index").unlink()
    assert any("shard-000000.index is missing" in p for p in verify(str(folder), progress=False, workers=1).problems)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("end", ["tar", "index"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_plain_file_is_not_waited_for(folder, kind, end):
    path = folder / f"shard-000001.{end}"
    path.unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda p: os.symlink("/dev/zero", p)}[kind](path)
    with pytest.raises(UserError, match=rf"shard-000001\.{end} is no plain file"):
        read_everything(folder)
    report = verify(str(folder), workers=1, progress=False)
    assert report.damaged == ("shard-000001",)


def test_an_index_of_another_shard(folder):
    shutil.copy(folder / "shard-000001.index", folder / "shard-000000.index")
    expect(folder, r"shard-000000\.index does not match the manifest")


def test_a_truncated_picture_with_a_good_checksum(tmp_path):
    good = png(picture(0, 8))
    folder = craft(tmp_path / "s", [("a/fine", good, None), ("a/cut", good[:-60], None)])
    expect(folder, r"shard-000000\.tar: sample 'a/cut': cannot be decoded")


def test_a_picture_of_another_size_or_format(tmp_path):
    expect(craft(tmp_path / "s", [("big", png(picture(0, 9)), None)]), "sample 'big': is 9x9 pixels, expected 8x8")
    expect(craft(tmp_path / "t", [("txt", b"hello", None)]), "sample 'txt': not a picture of a known format")


def test_a_decompression_bomb_is_not_decompressed(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (12500, 100_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
        expect(craft(tmp_path / str(side), [("bomb", bomb, None)]), "sample 'bomb': a picture of .*pixels")


@pytest.mark.parametrize(
    "key", ["../../etc/passwd", "/etc/passwd", "a/../b", "a//b", "a.b", "", "a\nb", "x" * 90 + "/" + "y" * 150]
)
def test_names_that_leave_the_folder(tmp_path, monkeypatch, key):
    monkeypatch.setattr("sivae_dist.data.shard_write.member_header", lambda name, size: bytes(512))
    folder = craft(tmp_path / "s", [(key, png(picture(0, 8)), None)])
    expect(folder, "its name is not allowed")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (["a", 512, 1 << 40, 0, None], "its size is outside"),
        (["a", 512, 0, 0, None], "its size is outside"),
        (["a", 512, 10, 1 << 40, None], "checksum has more than 32 bits"),
        (["a", 1 << 40, 10, 0, None], "its place is outside"),
        (["a", -512, 10, 0, None], "its place is outside"),
        (["a", 100, 10, 0, None], "its place is outside"),
        (["a", 0, 10, 0, None], "its place is outside"),
        (["a", 512, 10, 0, 3], "its label does not fit 0 classes"),
        (["a", 512, True, 0, None], "not a row"),
        (["a", 512, 10.0, 0, None], "not a row"),
        (["a", "512", 10, 0, None], "not a row"),
        ([None, 512, 10, 0, None], "its name is not allowed"),
        (["a", 512, 10], "not a row"),
        ({"a": 1}, "not a row"),
    ],
)
def test_index_rows_are_not_believed(tmp_path, row, text):
    folder = craft(tmp_path / "s", [("a", png(picture(0, 8)), None)])
    rewrite_index(folder, lambda lines: [lines[0], json.dumps(row)])
    expect(folder, text)


def rewrite_index(folder, change):
    """Changes the lines of the only index and makes the manifest agree, as a hostile author would."""
    path = folder / "shard-000000.index"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_manifest(folder, lambda raw: raw["shards"][0].update(index_sha256=digest))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda lines: [], "is no valid index"),
        (lambda lines: ["[1]", *lines[1:]], "is no valid index"),
        (lambda lines: [*lines, "[" * 100_000], "is no valid index"),
        (lambda lines: [lines[0].replace('"version": 1', '"version": 2'), *lines[1:]], "has format version 2"),
        (lambda lines: [*lines, lines[1]], "lists 3 samples"),
        (lambda lines: [lines[0], lines[1], lines[1]], "its place is outside"),
    ],
)
def test_indices_are_not_believed(tmp_path, change, text):
    folder = craft(tmp_path / "s", [("a", png(picture(0, 8)), None), ("b", png(picture(1, 8)), None)])
    rewrite_index(folder, change)
    expect(folder, text)


def test_verify_holds_the_tar_against_the_index(tmp_path):
    """Each of these keeps every checksum right, so only the comparison can find it."""
    pictures = [("a", png(picture(0, 8)), 0), ("b", png(picture(1, 8)), 1)]
    folder = craft(tmp_path / "fewer", pictures, classes=2)
    rewrite_index(folder, lambda lines: [lines[0].replace('"count": 2', '"count": 1'), lines[1]])
    edit_manifest(folder, lambda raw: raw["shards"][0].update(count=1))
    assert any("'b.png' that the index does not list" in p for p in verify(str(folder), progress=False).problems)
    folder = craft(tmp_path / "label", pictures, classes=2)
    rewrite_index(folder, lambda lines: [lines[0], lines[1], lines[2].replace(",1]", ",0]")])
    problems = verify(str(folder), progress=False).problems
    assert any("'b.cls': has label 1, the index has 0" in p for p in problems)
    assert any("'b.json': has label 1, the index has 0" in p for p in problems)
    folder = craft(tmp_path / "renamed", pictures, classes=2)
    rewrite_index(folder, lambda lines: [lines[0], lines[1], lines[2].replace('"b"', '"c"')])
    assert any("lacks 1 pictures that the index lists" in p for p in verify(str(folder), progress=False).problems)
    folder = craft(tmp_path / "twice", [pictures[0], ("a", pictures[1][1], 1)], classes=2)
    assert any("keys stand in it twice" in p for p in verify(str(folder), progress=False).problems)
    folder = craft(tmp_path / "shards", [pictures[0], ("a", pictures[1][1], 1)], classes=2, shards=2)
    assert any("1 keys stand in another shard too" in p for p in verify(str(folder), progress=False).problems)


def test_keys_in_several_shards_are_counted_in_little_memory(monkeypatch):
    rng = np.random.default_rng(3)
    shards = [[f"key-{n}" for n in rng.integers(0, 4000, size)] for size in (500, 0, 1, 900, 300, 900)]
    seen, expected = set(), []
    for keys in shards:
        expected.append(len(seen & set(keys)))
        seen |= set(keys)
    hashes = [verifying._hashes(keys) for keys in shards]
    assert [len(h) for h in hashes] == [len(set(keys)) for keys in shards]
    for at_once in (1 << 20, 100, 7):
        monkeypatch.setattr(verifying, "_KEYS_AT_ONCE", at_once)
        assert verifying._in_shards_before(hashes) == expected
    assert verifying._in_shards_before([]) == []
    monkeypatch.setattr(verifying, "_KEYS_AT_ONCE", 1 << 12)
    many = [np.sort(rng.integers(0, 1 << 64, 1 << 13, dtype=np.uint64)) for _ in range(32)]
    tracemalloc.start()
    assert verifying._in_shards_before(many) == [0] * 32
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 19, "the hashes themselves are four times that"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda raw: raw.update(format="tar"), "is no manifest of sivae shards"),
        (lambda raw: raw.update(version=2), "has format version 2, this program reads version 1"),
        (lambda raw: raw.update(resolution="16"), "has resolution = '16', expected int"),
        (lambda raw: raw.update(resolution=10**6), "has resolution = 1000000, expected 1 to 8192"),
        (lambda raw: raw.update(channels=2), "has 2 channels"),
        (lambda raw: raw.update(image_format="pickle"), "of format 'pickle'"),
        (lambda raw: raw.update(classes=True), "has classes = True"),
        (lambda raw: raw.update(class_names=["one"]), "has 1 class names for 3 classes"),
        (lambda raw: raw.update(shards={}), r"has shards = \{\}, expected list"),
        (lambda raw: raw["shards"].append(raw["shards"][0]), "lists a shard twice"),
        (lambda raw: raw["shards"].append(5), "has name = None"),
        (lambda raw: raw["shards"][0].update(name="../../x"), "has a shard called '../../x'"),
        (lambda raw: raw["shards"][0].update(split="secret"), "has split 'secret'"),
        (lambda raw: raw["shards"][0].update(count=-1), "has count = -1"),
        (lambda raw: raw["shards"][0].update(sha256="beef"), "malformed checksum"),
    ],
)
def test_manifests_are_not_believed(folder, change, text):
    edit_manifest(folder, change)
    with pytest.raises(UserError, match=text):
        load_manifest(FolderStore(folder))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_manifests_that_are_no_json(folder, data):
    (folder / FILE_NAME).write_bytes(data)
    with pytest.raises(UserError, match="is not valid JSON"):
        load_manifest(FolderStore(folder))


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("", "data.url is empty"),
        ("pipe:touch /tmp/owned", "would run a shell command, which is refused"),
        ("ftp://host/data", "has scheme 'ftp'"),
        ("http:///data", "names no host or bucket"),
        ("/no/such/folder", "is no folder"),
    ],
)
def test_urls_that_cannot_be_used(url, text):
    with pytest.raises(UserError, match=text):
        open_store(url)


def test_folders_that_are_no_shards(tmp_path, packed):
    with pytest.raises(UserError, match="sivae-dist data pack"):
        open_store(str(tmp_path))
    (tmp_path / ".pack").mkdir()
    with pytest.raises(UserError, match="only partly packed"):
        open_store(str(tmp_path))
    shutil.copytree(packed, tmp_path / "256")
    with pytest.raises(UserError, match="give one of its folders: 256"):
        open_store(str(tmp_path))
    assert open_store(f"file://{packed}").url == str(packed)


def test_few_file_handles_are_enough(folder, monkeypatch):
    monkeypatch.setattr("sivae_dist.data.stores.folder._OPEN_FILES", 2)
    monkeypatch.setattr("sivae_dist.data.shard_read._INDICES_KEPT", 2)
    store = FolderStore(folder)
    manifest = load_manifest(store)
    reader = ShardReader(store, manifest, manifest.shards)
    for _ in range(2):
        for shard in range(len(manifest.shards)):
            reader.read(shard, 0)
            assert len(store._open) <= 2
            assert len(reader._indices) <= 2


def test_an_unfinished_writer_leaves_nothing(tmp_path):
    writer = ShardWriter(tmp_path, "shard-000000", "train", tmp_path)
    writer.add("a", "png", b"x", None, {})
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_grey_and_unlabelled_folders(tmp_path):
    out = tmp_path / "grey.png"
    Image.new("L", (8, 8), 9).save(out)
    folder = craft(tmp_path / "s", [("a", out.read_bytes(), None)])
    edit_manifest(folder, lambda raw: raw.update(channels=1))
    (batch,) = read_everything(folder)
    assert batch.data.shape == (8, 1, 8, 8)
    assert batch.label is None
    manifest = Manifest.from_bytes((folder / FILE_NAME).read_bytes(), "x")
    assert [row[3] for row in load_index(FolderStore(folder), manifest.shards[0], 0).rows()] == [-1]

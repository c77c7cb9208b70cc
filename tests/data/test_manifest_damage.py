"""Manifests and indices that were damaged on their way: read again; or where they lie: a clear error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from drawn import edit_manifest
from web import How, serving

from sivae_dist.data.manifest import FILE_NAME, Manifest
from sivae_dist.data.shard_read import ShardReader, load_manifest
from sivae_dist.data.store import Access, FolderStore, open_store
from sivae_dist.errors import UserError


@pytest.fixture
def web(packed):
    with serving(packed) as server:
        yield server


@pytest.fixture
def folder(packed, tmp_path):
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def without_cache() -> Access:
    return Access(cache_gb=0, read_timeout_s=5, limit_s=20, retries=3)


def everything(store):
    manifest = load_manifest(store)
    reader = ShardReader(store, manifest, manifest.shards)
    return [reader.encoded(s, n) for s, info in enumerate(manifest.shards) for n in range(info.count)]


@pytest.mark.parametrize("name", ["manifest.json", "shard-000000.index"])
def test_small_files_damaged_twice_are_read_a_third_time(web, packed, name):
    bad = [How(flip=True), How(unsized=True, cut_after=100)]
    web.how = lambda a: bad[a.nth] if a.name == name and a.nth < 2 else How()
    assert everything(open_store(web.url, without_cache())) == everything(FolderStore(packed))
    assert web.names().count(name) == 3


def test_a_manifest_that_stays_damaged_is_an_error(web):
    web.how = lambda a: How(flip=True)
    with pytest.raises(UserError, match=r"manifest\.json (is damaged: its checksum differs|is not valid JSON)"):
        load_manifest(open_store(web.url, without_cache()))
    assert web.names() == ["manifest.json"] * 2, "the same bytes twice are what lies there"


def test_manifests_from_before_there_was_a_checksum(web, folder):
    """Damage to what decides which samples there are is read again; one that was edited is believed."""
    web.folder = folder
    edit_manifest(web.folder, lambda raw: raw.pop("checksum"))
    whole = load_manifest(open_store(web.url, without_cache()))
    assert len(web.asked) == 1
    good = (web.folder / "manifest.json").read_bytes()
    place = good.index(whole.shards[2].sha256.encode()) + 5
    bad = good[:place] + (b"0" if good[place] != ord("0") else b"1") + good[place + 1 :]

    def how(asked):
        (web.folder / "manifest.json").write_bytes(bad if asked.nth == 1 else good)
        return How()

    web.how = how
    assert load_manifest(open_store(web.url, without_cache())) == whole
    assert len(web.asked) == 3
    web.how = lambda a: How()
    (web.folder / "manifest.json").write_bytes(bad)
    assert load_manifest(open_store(web.url, without_cache())) != whole
    assert len(web.asked) == 5


def test_a_manifest_with_a_turned_bit_is_refused_or_says_the_same(packed):
    data = (packed / FILE_NAME).read_bytes()
    whole, refused = Manifest.from_bytes(data, "x"), 0
    for place in range(0, len(data), 7):
        turned = bytearray(data)
        turned[place] ^= 1 << place % 8
        try:
            found = Manifest.from_bytes(bytes(turned), "x")
        except UserError:
            refused += 1
            continue
        assert (found, found.packing) == (whole, whole.packing)
    assert refused > len(data) / 7 * 0.8


def test_an_edited_manifest_is_refused_until_its_checksum_is_gone(folder):
    raw = json.loads((folder / FILE_NAME).read_text())
    raw["license"] = "mine"
    (folder / FILE_NAME).write_text(json.dumps(raw, indent=4).replace("\n", "\r\n"))
    with pytest.raises(UserError, match="its checksum differs") as error:
        load_manifest(FolderStore(folder))
    assert 'remove "checksum"' in error.value.fix
    del raw["checksum"]
    (folder / FILE_NAME).write_text(json.dumps(raw))
    assert load_manifest(FolderStore(folder)).license == "mine"

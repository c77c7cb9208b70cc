"""pyramid.json: what a pyramid's root tells of its levels, and what happens where that is not so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from buckets import serving_bucket
from drawn import draw_folder, edit_manifest, files
from web import How, serving

from sivae_dist.apps.checks import storage
from sivae_dist.cli import main
from sivae_dist.data import pack as pack_module
from sivae_dist.data.loader import ShardsConfig
from sivae_dist.data.manifest import checksum
from sivae_dist.data.pack import pack
from sivae_dist.data.pack_shard import PackOptions
from sivae_dist.data.pyramid import addresses_of
from sivae_dist.data.pyramid_file import FILE_NAME, PyramidFile, read_pyramid
from sivae_dist.data.shard_read import load_manifest
from sivae_dist.data.sources.folder import FolderSource
from sivae_dist.data.store import Access, FolderStore, open_store
from sivae_dist.errors import UserError

SIDES = (8, 12)  # of which one is no power of two: nobody would guess it
OPTIONS = PackOptions(SIDES, format="png", shard_size="4")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """9 pictures at two resolutions, and `raw`, what they were packed from. Never change it, copy it."""
    root = tmp_path_factory.mktemp("original")
    pack(FolderSource(draw_folder(root / "raw", 9)), root / "out", OPTIONS, workers=1, progress=False)
    return root


@pytest.fixture
def out(original, tmp_path) -> Path:
    return Path(shutil.copytree(original / "out", tmp_path / "out"))


def change(out: Path, edit) -> None:
    """Applies edit(dict); the checksum is made to fit, as a hostile author would."""
    raw = json.loads((out / FILE_NAME).read_text())
    raw.update(edit(raw) or {})
    raw["checksum"] = checksum(raw)
    (out / FILE_NAME).write_text(json.dumps(raw))


def at(url: str, side: int) -> str:
    return ShardsConfig(url=url, workers=0, cache_gb=0, retries=0).at((3, side, side)).url


def test_it_tells_the_levels_and_their_fingerprints(original, tmp_path):
    out = original / "out"
    raw = json.loads((out / FILE_NAME).read_text())
    expected = [(side, load_manifest(FolderStore(out / str(side))).fingerprint) for side in SIDES]
    assert [(level["resolution"], level["fingerprint"]) for level in raw["levels"]] == expected
    assert (raw["format"], raw["version"], raw["checksum"]) == ("sivae-pyramid", 1, checksum(raw))
    found = read_pyramid(FolderStore(out))
    assert found == PyramidFile(tuple(expected))
    assert found.to_bytes() == (out / FILE_NAME).read_bytes()
    assert read_pyramid(FolderStore(out / "8")) is None, "a level has none"


def test_levels_that_nobody_would_guess_are_found_on_a_server(original):
    with serving(original / "out") as web:
        assert at(web.url, 12) == f"{web.url}/12"
        assert web.names() == ["manifest.json", FILE_NAME, "12/manifest.json"]
        assert addresses_of(web.url) == (f"{web.url}/8", f"{web.url}/12")


def test_it_names_its_folder(original, monkeypatch):
    monkeypatch.setenv("SIVAE_DATA_SIGNATURE", "sig=abc")
    with serving(original / "out") as web:
        for root, query in ((str(original / "out"), ""), (web.url, ""), (web.url, "?${SIVAE_DATA_SIGNATURE}")):
            assert at(f"{root}/{FILE_NAME}{query}", 8) == f"{root}/8{query}"
            assert addresses_of(f"{root}/{FILE_NAME}{query}") == (f"{root}/8{query}", f"{root}/12{query}")


def test_who_wants_one_level_is_told_which_there_are(original):
    with serving(original / "out") as web:
        for url in (str(original / "out"), web.url):
            with pytest.raises(UserError, match="holds several packed data sets") as told:
                load_manifest(open_store(url, Access(cache_gb=0, retries=0)))
            assert told.value.fix == "give one of its folders: 8, 12"
        with pytest.raises(UserError, match=r"/nowhere/manifest\.json is missing"):
            load_manifest(open_store(f"{web.url}/nowhere", Access(cache_gb=0)))
        web.how = lambda asked: How(404 if asked.name == "manifest.json" else 500)
        with pytest.raises(UserError, match=r"manifest\.json is missing"):
            load_manifest(open_store(web.url, Access(cache_gb=0, retries=0)))


def test_it_is_asked_for_again_when_it_was_damaged_on_its_way(original):
    with serving(original / "out") as web:
        web.how = lambda asked: How(flip=asked.name == FILE_NAME and asked.nth < 1)
        assert at(web.url, 8) == f"{web.url}/8"
        assert web.names().count(FILE_NAME) == 2
        web.asked.clear()
        web.how = lambda asked: How(flip=asked.name == FILE_NAME)
        with pytest.raises(UserError, match=r"/pyramid\.json (is|has|does)"):
            at(web.url, 8)
        assert web.names().count(FILE_NAME) == 2, "the same bytes twice are what lies there"
        web.how = lambda asked: How(500 if asked.name == FILE_NAME else 0)
        with pytest.raises(UserError, match="the server answers 500"):
            at(web.url, 8)


def test_the_same_command_adds_it_to_what_was_packed_before(original, out):
    before = files(out)
    (out / FILE_NAME).unlink()
    assert addresses_of(str(out)) == (f"{out}/8", f"{out}/12")
    assert at(str(out), 12) == f"{out}/12"
    report = pack(FolderSource(original / "raw"), out, OPTIONS, workers=1, progress=False)
    assert report.reused == len(report.manifest.shards)
    assert files(out) == before
    assert not (out / ".pack").exists()


def test_a_stop_before_it_is_written_is_mended(original, tmp_path, monkeypatch):
    def stopped(path, data, real=pack_module.write_atomically):
        if path.name == FILE_NAME:
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(pack_module, "write_atomically", stopped)
    with pytest.raises(KeyboardInterrupt):
        pack(FolderSource(original / "raw"), tmp_path / "new", OPTIONS, workers=1, progress=False)
    monkeypatch.undo()
    pack(FolderSource(original / "raw"), tmp_path / "new", OPTIONS, workers=1, progress=False)
    assert files(tmp_path / "new") == files(original / "out")


def test_a_single_resolution_has_none(original, tmp_path):
    pack(FolderSource(original / "raw"), tmp_path / "one", PackOptions(8), workers=1, progress=False)
    assert not (tmp_path / "one" / FILE_NAME).exists()


@pytest.mark.parametrize("place", ["folder", "server"])
def test_a_level_that_is_not_there(original, out, place, capsys):
    shutil.rmtree(out / "12")
    with serving(out) as web:
        url = str(out) if place == "folder" else web.url
        assert at(url, 8) == f"{url}/8", "a run needs its own level"
        for side, text in ((12, "lists pictures of 8, 12 pixels, but there is no "), (64, "the model takes 64")):
            with pytest.raises(UserError, match=text):
                at(url, side)
        for command in ("info", "verify"):
            with pytest.raises(SystemExit):
                main(["data", command, url])
            assert f"but there is no {url}/12/manifest.json" in capsys.readouterr().err
        with pytest.raises(UserError, match="but there is no"):
            storage.data(url)


@pytest.mark.parametrize("place", ["folder", "server"])
def test_a_level_that_is_another_one(original, out, tmp_path, place):
    edit_manifest(out / "12", lambda raw: raw["shards"].pop())
    with serving(out) as web:
        url = str(out) if place == "folder" else web.url
        for look in (lambda: at(url, 12), lambda: addresses_of(url)):
            with pytest.raises(UserError, match=r"12 holds other data than .*pyramid\.json lists") as told:
                look()
            assert f"give {url}/12 itself" in told.value.fix
        assert at(f"{url}/12", 12) == f"{url}/12"
        assert at(url, 8) == f"{url}/8"
    with pytest.raises(UserError, match=r"pyramid\.json lists other levels than lie beside it"):
        pack(FolderSource(original / "raw"), out, OPTIONS, workers=1, progress=False)
    assert not (out / ".pack").exists()


def test_a_level_that_is_not_listed(out):
    shutil.copytree(out / "8", out / "16")
    with pytest.raises(UserError, match=r"16 is not among the resolutions that .* lists \(8, 12\)"):
        addresses_of(str(out))
    with pytest.raises(UserError, match="holds pictures of 8, 12 pixels"):
        at(str(out), 16)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda raw: {"version": 2}, "has format version 2"),
        (lambda raw: {"format": "other"}, "does not tell the resolutions"),
        (lambda raw: {"levels": []}, "expected a list of 1 to 64"),
        (lambda raw: {"levels": raw["levels"] * 33}, "expected a list of 1 to 64"),
        (lambda raw: {"levels": raw["levels"][::-1]}, "the smallest first"),
        (lambda raw: {"levels": raw["levels"][:1] * 2}, "each once"),
        (lambda raw: {"levels": ["../.."]}, "a level of None pixels"),
        (lambda raw: {"levels": [{"resolution": True, "fingerprint": "0" * 64}]}, "a level of True pixels"),
        (lambda raw: {"levels": [{"resolution": 9000, "fingerprint": "0" * 64}]}, "expected 1 to 8192"),
        (lambda raw: {"levels": [{"resolution": 8, "fingerprint": "../.."}]}, "malformed fingerprint"),
    ],
)
def test_what_cannot_be_believed_is_refused(out, edit, text):
    change(out, edit)
    for look in (lambda: at(str(out), 8), lambda: addresses_of(str(out))):
        with pytest.raises(UserError, match=text):
            look()


def test_damage_is_found(out):
    data = (out / FILE_NAME).read_bytes()
    for damaged, text in (
        (data[:-9], "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "does not tell"),
        (data.replace(b'"resolution": 8', b'"resolution": 9'), "its checksum differs"),
        (bytes(2 << 20), "more than 1048576"),
    ):
        (out / FILE_NAME).write_bytes(damaged)
        with pytest.raises(UserError, match=text):
            at(str(out), 8)
    store = open_store(str(out / "8"), Access(cache_gb=0))
    assert load_manifest(store).resolution == 8, "a level alone does not ask"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_pyramid_in_a_bucket(original, monkeypatch, kind):
    with serving_bucket(kind, original / "out" / "8") as bucket:
        for name, value in bucket.env.items():
            monkeypatch.setenv(name, value)
        for path in (original / "out").rglob("*.*"):
            bucket.put(f"sets/pyramid/{path.relative_to(original / 'out')}", path.read_bytes())
        url = bucket.url.replace("packed", "pyramid")
        assert at(url, 12) == f"{url}/12"
        assert addresses_of(url) == (f"{url}/8", f"{url}/12")
        bucket.delete("sets/pyramid/12/manifest.json")
        with pytest.raises(UserError, match=r"but there is no .*/12/manifest"):
            at(url, 12)
        bucket.delete(f"sets/pyramid/{FILE_NAME}")
        assert at(url, 8) == f"{url}/8"

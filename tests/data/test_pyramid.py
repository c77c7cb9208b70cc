"""Several resolutions from one reading: the same samples at the same places in each."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from drawn import draw_folder, edit_manifest, files
from web import How, serving

import sivae_dist
from sivae_dist.apps.checks import storage
from sivae_dist.cli import main
from sivae_dist.data import pack as pack_module
from sivae_dist.data.loader import ShardsConfig
from sivae_dist.data.manifest import FILE_NAME
from sivae_dist.data.pack import pack
from sivae_dist.data.pack_shard import PackOptions
from sivae_dist.data.pyramid import addresses_of, disagreements
from sivae_dist.data.shard_read import ShardReader, load_index, load_manifest
from sivae_dist.data.sources.folder import FolderSource
from sivae_dist.data.store import FolderStore
from sivae_dist.engine.config import from_dict
from sivae_dist.engine.judge import judge
from sivae_dist.errors import UserError

SIDES = (8, 16, 32)


def levels_of(root: Path) -> list[Path]:
    return [Path(level) for level in addresses_of(str(root))]


def packed_quietly(source, destination, options, workers=1):
    return pack(source, destination, options, workers=workers, progress=False)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory) -> Path:
    """30 labelled pictures, 4 of them held out, at three resolutions. Never change it, copy it."""
    root = tmp_path_factory.mktemp("pyramid")
    source = FolderSource(draw_folder(root / "raw", 30, size=40, classes=2), labels=True)
    packed_quietly(source, root / "out", PackOptions(SIDES, format="png", shard_size="7", val_count=4))
    return root


def test_every_resolution_is_what_packing_it_alone_gives(pyramid, tmp_path):
    assert [p.name for p in levels_of(pyramid / "out")] == ["8", "16", "32"]
    for side in SIDES:
        alone = tmp_path / str(side)
        source = FolderSource(pyramid / "raw", labels=True)
        packed_quietly(source, alone, PackOptions(side, format="png", shard_size="7", val_count=4))
        one, level = files(alone), files(pyramid / "out" / str(side))
        assert {n: b for n, b in one.items() if n != FILE_NAME} == {n: b for n, b in level.items() if n != FILE_NAME}
        first, second = (json.loads(found[FILE_NAME]) for found in (one, level))
        assert first.pop("packing") != second.pop("packing")
        assert first.pop("checksum") != second.pop("checksum")
        assert first == second


def test_keys_and_shards_are_the_same_at_all_resolutions(pyramid):
    levels = levels_of(pyramid / "out")
    seen = []
    for level in levels:
        store = FolderStore(level)
        manifest = load_manifest(store)
        assert manifest.resolution == int(level.name)
        seen.append([(s.name, s.split, load_index(store, s, 2).keys) for s in manifest.shards])
    assert seen[0] == seen[1] == seen[2]
    assert disagreements(levels) == []


def test_each_picture_is_read_once(pyramid, tmp_path, monkeypatch):
    source = FolderSource(pyramid / "raw")
    real, opened = source.open, []
    monkeypatch.setattr(source, "open", lambda item, side: (opened.append((item.key, side)), real(item, side))[1])
    monkeypatch.setattr(pack_module, "_PROBES", 1)
    packed_quietly(source, tmp_path / "out", PackOptions(SIDES, format="png"))
    assert len(opened) == 30 + 1
    assert {side for _, side in opened} == {32}


def test_the_largest_resolution_decides_how_many_samples_a_shard_has(pyramid, tmp_path):
    def counts(sides):
        options = PackOptions(sides, format="png", shard_size="30KB")
        report = packed_quietly(FolderSource(pyramid / "raw"), tmp_path / str(sides), options)
        return [[s.count for s in m.shards] for m in report.manifests]

    small, large = counts(8)[0], counts(32)[0]
    assert len(small) < len(large)
    assert counts((8, 32)) == [large, large]


def test_bytes_do_not_depend_on_the_number_of_workers(pyramid, tmp_path):
    source = FolderSource(pyramid / "raw", labels=True)
    options = PackOptions(SIDES, format="png", shard_size="7", val_count=4)
    packed_quietly(source, tmp_path / "three", options, workers=3)
    assert tree(tmp_path / "three") == tree(pyramid / "out")


def test_an_unreadable_picture_is_left_out_of_all(pyramid, tmp_path):
    raw = draw_folder(tmp_path / "raw", 6)
    (raw / "0002.png").write_bytes(b"no")
    report = packed_quietly(FolderSource(raw), tmp_path / "out", PackOptions(SIDES, shard_size="2"))
    assert [key for key, _ in report.skipped] == ["0002"]
    assert report.enlarged == 5
    for side in SIDES:
        assert load_manifest(FolderStore(tmp_path / "out" / str(side))).splits()["train"]["samples"] == 5
        assert (tmp_path / "out" / str(side) / "skipped.json").is_file()


def test_interrupted_between_any_two_writes_it_goes_on(pyramid, tmp_path, monkeypatch):
    source = FolderSource(pyramid / "raw", labels=True)
    options = PackOptions(SIDES, format="png", shard_size="7", val_count=4)
    destination = tmp_path / "out"
    real = pack_module.write_atomically
    for name in (FILE_NAME, "options.json", "pyramid.json"):
        for nth in range(3 if name == FILE_NAME else 1):
            count = 0

            def stopped(path, data, name=name, nth=nth):
                nonlocal count
                if path.name == name:
                    count += 1
                    if count > nth:
                        raise KeyboardInterrupt
                real(path, data)

            shutil.rmtree(destination, ignore_errors=True)
            monkeypatch.setattr(pack_module, "write_atomically", stopped)
            with pytest.raises(KeyboardInterrupt):
                packed_quietly(source, destination, options)
            monkeypatch.setattr(pack_module, "write_atomically", real)
            packed_quietly(source, destination, options)
            assert tree(destination) == tree(pyramid / "out"), (name, nth)


def test_a_shard_is_safe_on_the_disk_before_the_note_that_says_so(tmp_path, monkeypatch):
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def note_sync(descriptor):
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).relative_to(tmp_path / 'out')}")
        sync(descriptor)

    def note_move(source, target):
        done.append(f"move {Path(target).relative_to(tmp_path / 'out')}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_move)
    packed_quietly(FolderSource(draw_folder(tmp_path / "raw", 2)), tmp_path / "out", PackOptions((8, 16)))
    note = done.index("move .pack/shard-000000.done")
    for level in ("8", "16"):
        for end in ("tar", "index"):
            written = next(
                n for n, what in enumerate(done) if what.startswith(f"sync .pack/{level}/shard-000000.{end}")
            )
            moved = done.index(f"move {level}/shard-000000.{end}")
            assert written < moved < done.index(f"sync {level}", moved) < note
        assert note < done.index("sync .pack", note) < done.index(f"move {level}/manifest.json")


def test_a_lost_shard_of_one_resolution_is_made_again(pyramid, tmp_path, monkeypatch):
    source = FolderSource(pyramid / "raw", labels=True)
    options = PackOptions(SIDES, format="png", shard_size="7", val_count=4)
    destination = tmp_path / "out"
    monkeypatch.setattr(pack_module, "_conclude", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packed_quietly(source, destination, options)
    monkeypatch.undo()
    (destination / "16" / "shard-000001.tar").unlink()
    index = destination / "8" / "shard-000002.index"
    index.write_bytes(bytes(len(index.read_bytes())))
    report = packed_quietly(source, destination, options)
    assert report.reused == len(report.manifest.shards) - 2
    assert tree(destination) == tree(pyramid / "out")


def test_another_packing_in_its_place_is_refused(pyramid, tmp_path):
    source = FolderSource(pyramid / "raw")
    shutil.copytree(pyramid / "out", tmp_path / "out")
    before = tree(tmp_path / "out")
    options = {"format": "png", "shard_size": "7", "val_count": 4}
    with pytest.raises(UserError, match=r"resolution was \[8, 16, 32\], now \[8, 16\]"):
        packed_quietly(FolderSource(pyramid / "raw", labels=True), tmp_path / "out", PackOptions((8, 16), **options))
    with pytest.raises(UserError, match="is not empty"):
        packed_quietly(source, tmp_path / "out", PackOptions(8, **options))
    assert tree(tmp_path / "out") == before
    packed_quietly(source, tmp_path / "single", PackOptions(8))
    with pytest.raises(UserError, match=r"resolution was 8, now \[8, 16\]"):
        packed_quietly(source, tmp_path / "single", PackOptions((8, 16)))
    assert not (tmp_path / "single" / ".pack").exists()


def test_space_is_counted_for_all_resolutions(pyramid, tmp_path, monkeypatch):
    source, options = FolderSource(pyramid / "raw"), PackOptions(SIDES, format="png")
    real, means = pack_module.shutil.disk_usage, []
    estimate = pack_module._estimate
    monkeypatch.setattr(pack_module, "_estimate", lambda *a: means.append(estimate(*a)) or means[-1])

    def free(size):
        monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda p: real(p)._replace(free=int(size)))

    free(0)
    with pytest.raises(UserError, match="GB are needed"):
        packed_quietly(source, tmp_path / "out", options)
    assert len(means[0]) == 3
    for enough in (max(means[0]), 0.99 * sum(means[0])):
        free(30 * 1.1 * enough)
        with pytest.raises(UserError, match="GB are needed"):
            packed_quietly(source, tmp_path / "out", options)
    free(30 * 1.1 * sum(means[0]) + 1)
    packed_quietly(source, tmp_path / "out", options)


@pytest.mark.parametrize(("sides", "text"), [((), "one or several"), ((16, 8), "smallest first"), ((8, 8), "once")])
def test_bad_resolutions_are_refused(sides, text):
    with pytest.raises(UserError, match=text):
        PackOptions(sides)


def test_levels_that_differ_are_found(pyramid, tmp_path):
    shutil.copytree(pyramid / "out", tmp_path / "out")
    packed_quietly(
        FolderSource(pyramid / "raw", labels=True),
        tmp_path / "other",
        PackOptions(16, format="png", shard_size="7", val_count=4, seed=1),
    )
    shutil.rmtree(tmp_path / "out" / "16")
    shutil.copytree(tmp_path / "other", tmp_path / "out" / "16")
    with pytest.raises(UserError, match="16 holds other data than"):
        levels_of(tmp_path / "out")
    (tmp_path / "out" / "pyramid.json").unlink()  # as in data packed before there was one
    problems = disagreements(levels_of(tmp_path / "out"))
    assert "16/shard-000000 has other samples than" in problems[0]
    edit_manifest(tmp_path / "out" / "32", lambda raw: raw["shards"].pop())
    assert any("32 has other shards than" in p for p in disagreements(levels_of(tmp_path / "out")))


def test_a_run_takes_its_resolution(pyramid, tmp_path, monkeypatch):
    for url in (f"{pyramid}/out", f"file://{pyramid}/out/", "${RAWDATA}/out"):
        monkeypatch.setenv("RAWDATA", str(pyramid))
        data = ShardsConfig(url=url, workers=0).at((3, 16, 16))
        assert data.url == f"{url.rstrip('/')}/16"
        stream = data.build(seed=0, salt=0, rank=0, ranks=1)
        assert stream.sample_shape == (3, 16, 16)
        stream.close()
        with pytest.raises(UserError, match="holds pictures of 8, 16, 32 pixels, the model takes 64"):
            ShardsConfig(url=url).at((3, 64, 64))
    for url in (f"{pyramid}/out/16", "", "http://x/a.json", "http://x/{a,b}", "pipe:cat", f"{pyramid}/out/{{16,8}}"):
        assert ShardsConfig(url=url).at((3, 64, 64)).url == url


@pytest.mark.parametrize("refusal", [404, 403])
@pytest.mark.parametrize("told", [True, False])
def test_a_run_takes_its_resolution_from_a_server(pyramid, monkeypatch, refusal, told):
    """Servers list nothing, and some say 403 of what is not there. told: by pyramid.json, which older data lack."""
    monkeypatch.setenv("SIVAE_DATA_SIGNATURE", "sig=abc")
    with serving(pyramid / "out") as web:

        def how(asked):
            there = (web.folder / asked.name).is_file() and (told or asked.name != "pyramid.json")
            return How() if there else How(refusal)

        web.how = how
        for url, expected in ((f"{web.url}/", f"{web.url}/16"), (f"{web.url}?${{SIVAE_DATA_SIGNATURE}}", None)):
            data = ShardsConfig(url=url, workers=0, cache_gb=0).at((3, 16, 16))
            assert data.url == (expected or f"{web.url}/16?${{SIVAE_DATA_SIGNATURE}}")
            stream = data.build(seed=0, salt=0, rank=0, ranks=1)
            assert stream.sample_shape == (3, 16, 16)
            stream.close()
        assert web.asked[-1].target == "/16/manifest.json?sig=abc"
        web.asked.clear()
        with pytest.raises(UserError, match=r"of 8, 16, 32 pixels, with data\.reduce 2 the model takes 128"):
            ShardsConfig(url=web.url, reduce=2).at((3, 64, 64))
        assert told == (web.names() == ["manifest.json", "pyramid.json"]), "nobody guesses where it is told"
        web.asked.clear()
        for url in (f"{web.url}/16", f"{web.url}/16/manifest.json"):
            assert ShardsConfig(url=url).at((3, 64, 64)).url == url
        assert web.names() == ["16/manifest.json"], "a shard folder is taken as it is, an address of a file unasked"
        assert ShardsConfig(url=f"{web.url}/other").at((3, 64, 64)).url == f"{web.url}/other"
        web.how = lambda asked: How(500)
        with pytest.raises(UserError, match="the server answers 500"):
            ShardsConfig(url=web.url, retries=0).at((3, 16, 16))


def test_commands_take_a_pyramid_on_a_server(pyramid, tmp_path, capsys):
    shutil.copytree(pyramid / "out", tmp_path / "out")
    with serving(tmp_path / "out") as web:
        assert addresses_of(web.url) == tuple(f"{web.url}/{side}" for side in SIDES)
        assert addresses_of(f"{web.url}/16") == addresses_of(f"{web.url}/elsewhere") == ()
        main(["data", "info", web.url])
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:3]] == ["8", "16", "32"]
        main(["data", "verify", web.url, "--workers", "1"])
        assert capsys.readouterr().out.count("samples in") == 3
        assert [check.status for check in storage.data(web.url)] == ["ok"] * 3
        edit_manifest(tmp_path / "out" / "32", lambda raw: raw["shards"].pop())
        with pytest.raises(SystemExit):
            main(["data", "verify", web.url, "--workers", "1"])
        assert f"{web.url}/32 holds other data than {web.url}/pyramid.json lists" in capsys.readouterr().err
        (tmp_path / "out" / "pyramid.json").unlink()
        with pytest.raises(SystemExit):
            main(["data", "verify", web.url, "--workers", "1"])
        assert f"{web.url}/32 has other shards than {web.url}/8" in capsys.readouterr().out


@pytest.mark.slow
def test_training_and_evaluation_take_it_too(pyramid, tmp_path):
    values = {
        "model": {"image_size": 16, "channels": [4, 4], "zdim": 4},
        "data": {"url": f"{pyramid}/out", "workers": 0},
        "train": {"kimg": 0.008, "batch": 4},
        "eval": {"images": 4},
    }
    sivae_dist.train(from_dict(values, "test"), tmp_path / "run")
    metrics, _ = judge(tmp_path / "run", images=4)
    assert "eval/psnr" in metrics


def test_levels_are_read_like_any_shard_folder(pyramid):
    for level in levels_of(pyramid / "out"):
        store = FolderStore(level)
        manifest = load_manifest(store)
        sample = ShardReader(store, manifest, manifest.shards).read(0, 0)
        assert sample.image.shape == (3, int(level.name), int(level.name))
        assert np.asarray(sample.image).std() > 0

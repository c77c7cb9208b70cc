"""The packer: same bytes however it ran, nothing lost by a kill, readable by others, honest about what it left out."""

from __future__ import annotations

import errno
import glob
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from drawn import draw_folder, files, picture
from PIL import Image
from processes import children, gone

from sivae_dist import files as files_module
from sivae_dist.data import pack as pack_module
from sivae_dist.data import pack_aside
from sivae_dist.data.manifest import Manifest
from sivae_dist.data.pack import pack
from sivae_dist.data.pack_shard import PackOptions
from sivae_dist.data.shard_read import ShardReader, load_manifest
from sivae_dist.data.sources import folder as folder_module
from sivae_dist.data.sources.base import Item
from sivae_dist.data.sources.folder import FolderSource
from sivae_dist.data.store import FolderStore
from sivae_dist.errors import UserError


def packed_quietly(source, destination, options, workers=1):
    return pack(source, destination, options, workers=workers, progress=False)


def keys_of(folder: Path) -> dict[str, list[str]]:
    store = FolderStore(folder)
    manifest = load_manifest(store)
    reader = ShardReader(store, manifest, manifest.shards)
    found: dict[str, list[str]] = {}
    for number, shard in enumerate(manifest.shards):
        found.setdefault(shard.split, []).extend(reader.index(number).keys)
    return found


@pytest.mark.parametrize("image_format", ["jpg", "webp", "png"])
def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path, image_format):
    source = FolderSource(draw_folder(tmp_path / "raw", 23, classes=2), labels=True)
    options = PackOptions(16, format=image_format, shard_size="5", val_fraction=0.2)
    packed_quietly(source, tmp_path / "one", options, workers=1)
    packed_quietly(source, tmp_path / "three", options, workers=3)
    one, three = files(tmp_path / "one"), files(tmp_path / "three")
    assert one == three
    assert sum(name.endswith(".tar") for name in one) >= 5
    assert sorted(os.listdir(tmp_path / "one")) == sorted(one), "nothing but the data set is left behind"


def test_every_picture_is_there_once_and_unchanged(packed):
    store = FolderStore(packed)
    manifest = load_manifest(store)
    reader = ShardReader(store, manifest, manifest.shards)
    seen = {}
    for shard, info in enumerate(manifest.shards):
        for number in range(info.count):
            sample = reader.read(shard, number)
            seen[sample.key] = sample
    assert len(seen) == 41
    assert {k: v["samples"] for k, v in manifest.splits().items()} == {"train": 36, "val": 5}
    assert manifest.class_names == ("class0", "class1", "class2")
    for number in range(41):
        sample = seen[f"class{number % 3}/{number:04d}"]
        assert sample.label == number % 3
        expected = Image.fromarray(picture(number)).resize((16, 16), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(sample.image, np.asarray(expected).transpose(2, 0, 1))


def test_stock_webdataset_reads_it(packed):
    tars = sorted(glob.glob(f"{packed}/*.tar"))
    pipeline = webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png", "json", "cls")
    samples = list(pipeline)
    expected = keys_of(packed)
    assert [s[0] for s in samples] == expected["train"] + expected["val"]
    for key, image, facts, label in samples:
        assert image.shape == (16, 16, 3)
        assert facts == {"file": f"{key}.png", "label": label}
        assert label == int(key[5])


def test_tar_headers_are_plain(packed):
    header = (packed / "shard-000000.tar").read_bytes()[:512]
    assert header[257:263] == b"ustar\0"
    assert header[136:148] == b"00000000000\0", "mtime 0"


SLOW_PACK = """
import sys
from pathlib import Path
from sivae_dist.data.pack import pack
from sivae_dist.data.pack_shard import PackOptions
from sivae_dist.data.sources.folder import FolderSource
pack(FolderSource(Path(sys.argv[1])), Path(sys.argv[2]), PackOptions(64, format="png", shard_size="8", val_count=9),
     workers=2, progress=False)
"""


@pytest.mark.dist
def test_a_kill_loses_and_doubles_nothing(tmp_path):
    raw = draw_folder(tmp_path / "raw", 80, size=220)
    killed, clean = tmp_path / "killed", tmp_path / "clean"
    process = subprocess.Popen([sys.executable, "-c", SLOW_PACK, str(raw), str(killed)])
    deadline = time.monotonic() + 60
    while len(list(killed.glob(".pack/*.done"))) < 3:
        assert process.poll() is None, "it finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(workers) == 2
    assert not (killed / "manifest.json").exists()
    options = PackOptions(64, format="png", shard_size="8", val_count=9)
    with pytest.raises(UserError, match="quality was None, now 80"):
        packed_quietly(
            FolderSource(raw), killed, PackOptions(64, format="webp", quality=80, shard_size="8", val_count=9)
        )
    report = packed_quietly(FolderSource(raw), killed, options)
    assert 3 <= report.reused < 10
    packed_quietly(FolderSource(raw), clean, options)
    assert files(killed) == files(clean)
    keys = keys_of(killed)
    assert len(keys["val"]) == 9
    assert sorted(keys["train"] + keys["val"]) == [f"{n:04d}" for n in range(80)]
    assert gone(workers), "orphaned workers end"


def test_a_finished_shard_is_not_made_again_and_a_damaged_one_is(tmp_path, monkeypatch):
    source = FolderSource(draw_folder(tmp_path / "raw", 12))
    options, destination = PackOptions(8, format="png", shard_size="3"), tmp_path / "shards"
    real, made = pack_module.pack_shard, []

    def interrupted(task, tick, **rest):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(task.name)
        return real(task, tick, **rest)

    monkeypatch.setattr(pack_module, "pack_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packed_quietly(source, destination, options)
    (destination / "shard-000001.tar").write_bytes(b"cut")
    monkeypatch.setattr(pack_module, "pack_shard", lambda t, k, **r: (made.append(t.name), real(t, k, **r))[1])
    made.clear()
    assert packed_quietly(source, destination, options).reused == 2
    assert made == ["shard-000001", "shard-000003"]
    assert packed_quietly(source, destination, options).reused == 4
    assert len(made) == 2


def test_changed_options_or_pictures_are_refused(tmp_path):
    raw, destination = draw_folder(tmp_path / "raw", 6), tmp_path / "shards"
    packed_quietly(FolderSource(raw), destination, PackOptions(8))
    before = files(destination)
    with pytest.raises(UserError, match=r"already packed, otherwise \(resolution was 8, now 16\)"):
        packed_quietly(FolderSource(raw), destination, PackOptions(16))
    Image.fromarray(picture(99)).save(raw / "new.png")
    with pytest.raises(UserError, match="the pictures in the source"):
        packed_quietly(FolderSource(raw), destination, PackOptions(8))
    assert files(destination) == before
    assert not (destination / ".pack").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        packed_quietly(FolderSource(raw), tmp_path / "full", PackOptions(8))


def test_two_packers_do_not_meet_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_aside, "_WAIT_S", 0.1)
    source, destination = FolderSource(draw_folder(tmp_path / "raw", 3)), tmp_path / "shards"
    with pack_aside.held(destination / ".pack"), pytest.raises(UserError, match="another process is packing"):
        packed_quietly(source, destination, PackOptions(8))


def test_who_waited_for_a_packer_that_finished_goes_on(tmp_path, monkeypatch):
    """Its lock file is gone by then: a lock on that would keep nobody out."""
    source, destination = FolderSource(draw_folder(tmp_path / "raw", 3)), tmp_path / "shards"
    aside, real, finished = destination / ".pack", pack_aside.try_lock, []

    def lock_of_another(file, others):
        if not finished:
            finished.append(True)
            pack_aside.remove(aside)
        return real(file, others)

    monkeypatch.setattr(pack_aside, "try_lock", lock_of_another)
    packed_quietly(source, destination, PackOptions(8))
    assert load_manifest(FolderStore(destination)).shards[0].count == 3
    assert finished and not aside.exists()


def test_who_comes_while_a_packer_finishes_makes_the_folder_anew(tmp_path):
    aside = tmp_path / ".pack"
    with pack_aside.held(aside):
        real, others = Path.unlink, []

        def unlink(path, **rest):
            real(path, **rest)
            others.append(pack_aside.held(aside))
            others[-1].__enter__()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "unlink", unlink)
            pack_aside.remove(aside)
    assert len(others) == 1 and list(aside.iterdir()) == [aside / "lock"]
    others[0].__exit__(None, None, None)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EACCES])
def test_packing_where_the_file_system_knows_no_locks(tmp_path, monkeypatch, capsys, number):
    """It had been told to wait for another process; what is no lack of locks is not passed over."""

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files_module.fcntl, "flock", flock)
    source = FolderSource(draw_folder(tmp_path / "raw", 3))
    if number == errno.EACCES:
        with pytest.raises(PermissionError):
            packed_quietly(source, tmp_path / "shards", PackOptions(8))
        return
    packed_quietly(source, tmp_path / "shards", PackOptions(8))
    told = f"take care that no other process packs into {tmp_path / 'shards'}"
    assert told in capsys.readouterr().err


def test_unreadable_pictures_are_skipped_and_listed(tmp_path):
    raw = draw_folder(tmp_path / "raw", 9)
    whole = (raw / "0003.png").read_bytes()
    (raw / "0003.png").write_bytes(whole[: len(whole) // 2])
    (raw / "0005.png").write_bytes(b"GIF, no: text")
    Image.new("1", (12500, 12500)).save(raw / "bomb.png")
    Image.new("1", (14000, 14000)).save(raw / "bomb2.png")
    report = packed_quietly(FolderSource(raw), tmp_path / "shards", PackOptions(16, shard_size="4"))
    reasons = dict(report.skipped)
    assert set(reasons) == {"0003", "0005", "bomb", "bomb2"}
    assert "truncated" in reasons["0003"]
    assert "not a picture of a known format" in reasons["0005"]
    assert "12500x12500 pixels" in reasons["bomb"]
    assert "more than 134217728 pixels" in reasons["bomb2"]
    listed = json.loads((tmp_path / "shards" / "skipped.json").read_text())
    assert {entry["key"]: entry["reason"] for entry in listed} == reasons
    assert sorted(keys_of(tmp_path / "shards")["train"]) == [f"{n:04d}" for n in (0, 1, 2, 4, 6, 7, 8)]
    assert report.enlarged == 0
    again = packed_quietly(FolderSource(raw), tmp_path / "shards", PackOptions(16, shard_size="4"))
    assert dict(again.skipped) == reasons


def test_shards_that_end_up_empty_are_left_out_and_a_set_without_pictures_is_an_error(tmp_path):
    raw = draw_folder(tmp_path / "raw", 4)
    for number in (0, 1):
        (raw / f"{number:04d}.png").write_bytes(b"nothing")
    options = PackOptions(16, shard_size="2", shuffle=False)
    report = packed_quietly(FolderSource(raw), tmp_path / "shards", options)
    assert [s.name for s in report.manifest.shards] == ["shard-000001"]
    assert sorted(files(tmp_path / "shards")) == [
        "manifest.json",
        "shard-000001.index",
        "shard-000001.tar",
        "skipped.json",
    ]
    for path in raw.iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="none of 4 pictures tried can be read"):
        packed_quietly(FolderSource(raw), tmp_path / "none", options)


def test_small_pictures_are_counted(tmp_path):
    report = packed_quietly(FolderSource(draw_folder(tmp_path / "raw", 3)), tmp_path / "shards", PackOptions(32))
    assert report.enlarged == 3


class ListSource:
    """A source given by its items; its pictures are grey."""

    name, license = "list", "none"

    def __init__(self, items):
        self._items = items

    def __len__(self):
        return len(self._items)

    def items(self):
        return iter(self._items)

    def open(self, item, resolution):
        return Image.new("RGB", (resolution, resolution), (len(item.key),) * 3)


@pytest.mark.parametrize(
    ("items", "text"),
    [
        ([Item("a"), Item("a")], "'a' stands for two items"),
        ([Item("../a")], "not allowed"),
        ([Item("/a")], "not allowed"),
        ([Item("a.b")], "not allowed"),
        ([Item("x" * 150)], "too long for a tar"),
        ([Item("a", split="test")], "has split 'test'"),
        ([Item("a", label=-1)], "has label -1"),
        ([Item("a", label=0), Item("b")], "1 of 2 items have no label"),
        ([Item("a", split="val")], "none is left for training"),
        ([], "no pictures"),
    ],
)
def test_bad_items_are_refused(tmp_path, items, text):
    with pytest.raises(UserError, match=text):
        packed_quietly(ListSource(items), tmp_path / "shards", PackOptions(8))


def test_a_split_of_the_source_is_kept(tmp_path):
    items = [Item(f"k{n}", split="val" if n % 4 == 0 else "train", meta={"n": n}) for n in range(12)]
    with pytest.raises(UserError, match="its own validation split of 3"):
        packed_quietly(ListSource(items), tmp_path / "shards", PackOptions(8, val_count=2))
    packed_quietly(ListSource(items), tmp_path / "kept", PackOptions(8))
    assert sorted(keys_of(tmp_path / "kept")["val"]) == ["k0", "k4", "k8"]


def test_the_hash_split_stays_when_the_set_grows(tmp_path):
    def val(count):
        destination = tmp_path / f"n{count}"
        packed_quietly(ListSource([Item(f"k{n}") for n in range(count)]), destination, PackOptions(8, val_fraction=0.1))
        return set(keys_of(destination)["val"])

    small, large = val(200), val(300)
    assert 8 <= len(small) <= 35
    assert small == {k for k in large if int(k[1:]) < 200}


def test_order_is_shuffled_by_seed_or_left(tmp_path):
    source = ListSource([Item(f"k{n:03d}") for n in range(50)])
    plain = [f"k{n:03d}" for n in range(50)]

    def order(name, **options):
        packed_quietly(source, tmp_path / name, PackOptions(8, **options))
        return keys_of(tmp_path / name)["train"]

    assert order("left", shuffle=False) == plain
    first, second = order("a"), order("b", seed=1)
    assert first != plain
    assert first != second
    assert sorted(first) == sorted(second) == plain


def test_shard_sizes(tmp_path):
    assert PackOptions(8, shard_size="300").samples_per_shard(1e5) == 300
    assert PackOptions(8, shard_size="10MB").samples_per_shard(1e5) == 100
    assert PackOptions(8, shard_size="1.5 KiB").samples_per_shard(1e5) == 1
    assert PackOptions(8).samples_per_shard(1e5) == 1024
    assert PackOptions(8).samples_per_shard(1e6) == 256
    source = ListSource([Item(f"k{n}") for n in range(100)])
    counts = [s.count for s in packed_quietly(source, tmp_path / "s", PackOptions(8, shard_size="30")).manifest.shards]
    assert counts == [25, 25, 25, 25]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"resolution": 0}, "resolution is 0"),
        ({"resolution": 8, "format": "bmp"}, "format is 'bmp', expected one of jpg, webp, png"),
        ({"resolution": 8, "quality": 101}, "quality is 101"),
        ({"resolution": 8, "format": "png", "quality": 90}, "none for png"),
        ({"resolution": 8, "channels": 4}, "channels is 4"),
        ({"resolution": 8, "shard_size": "many"}, "shard_size is 'many'"),
        ({"resolution": 8, "shard_size": "0"}, "shard_size is '0'"),
        ({"resolution": 8, "val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"resolution": 8, "val_fraction": 0.1, "val_count": 3}, "val_count is 3"),
    ],
)
def test_bad_options_are_refused(options, text):
    with pytest.raises(UserError, match=text):
        PackOptions(**options)


def test_a_full_disk_is_said_before_and_during(tmp_path, monkeypatch):
    source = FolderSource(draw_folder(tmp_path / "raw", 3))
    real = pack_module.shutil.disk_usage
    monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda p: real(p)._replace(free=100))
    with pytest.raises(UserError, match="GB are needed"):
        packed_quietly(source, tmp_path / "a", PackOptions(8))
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sivae_dist.data.shard_write.ShardWriter.add", full)
    with pytest.raises(UserError, match=r"shard-000000\.tar cannot be written: No space left"):
        packed_quietly(source, tmp_path / "b", PackOptions(8))
    assert not list((tmp_path / "b").glob("shard*"))
    monkeypatch.undo()
    packed_quietly(source, tmp_path / "b", PackOptions(8))


@pytest.mark.parametrize(
    ("error", "workers"),
    [(errno.EIO, 1), (errno.ESTALE, 2), (errno.ENOENT, 1), (errno.EACCES, 1), (errno.EMFILE, 1)],
)
def test_a_source_that_fails_ends_the_packing_and_the_same_command_goes_on(tmp_path, monkeypatch, error, workers):
    source = FolderSource(draw_folder(tmp_path / "raw", 40))
    options = PackOptions(8, format="png", shard_size="5", shuffle=False)
    whole = packed_quietly(source, tmp_path / "whole", options).manifest
    real = folder_module.file_bytes

    def failing(path):
        if path.name == "0012.png":  # not one of those that are tried beforehand
            raise OSError(error, os.strerror(error), str(path))
        return real(path)

    monkeypatch.setattr(folder_module, "file_bytes", failing)
    with pytest.raises(UserError, match=rf"0012\.png of raw cannot be read: {os.strerror(error)}") as raised:
        packed_quietly(source, tmp_path / "out", options, workers=workers)
    assert "run the same command again" in raised.value.fix
    done = {path.stem for path in (tmp_path / "out" / ".pack").glob("*.done")}
    assert {"shard-000000"} <= done and "shard-000002" not in done
    assert not list(tmp_path.glob("out/shard-000002*")) and not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.undo()
    report = packed_quietly(source, tmp_path / "out", options)
    assert report.reused == len(done) and not report.skipped
    assert files(tmp_path / "out") == files(tmp_path / "whole") and report.manifest == whole


class ShrinkingSource(FolderSource):
    """One of its files goes after it was listed."""

    def items(self):
        yield from super().items()
        (self.root / "0001.png").unlink(missing_ok=True)


def test_a_source_that_fails_at_the_first_pictures_is_said_at_once(tmp_path):
    source = ShrinkingSource(draw_folder(tmp_path / "raw", 3))
    with pytest.raises(UserError, match=r"0001\.png of raw cannot be read: No such file"):
        packed_quietly(source, tmp_path / "out", PackOptions(8))


def test_files_larger_than_any_picture_are_not_read(tmp_path):
    raw = draw_folder(tmp_path / "raw", 3)
    with open(raw / "huge.png", "wb") as file:
        file.truncate(3 << 30)
    report = packed_quietly(FolderSource(raw), tmp_path / "out", PackOptions(8))
    assert dict(report.skipped) == {"huge": "a file of more than 2147483648 bytes"}


class DyingSource(ListSource):
    """Its worker process is killed, as when memory runs out."""

    def open(self, item, resolution):
        if item.key == "k7" and os.getpid() != PARENT:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open(item, resolution)


PARENT = os.getpid()


@pytest.mark.dist
def test_a_killed_worker_is_an_error_and_no_hang(tmp_path):
    source = DyingSource([Item(f"k{n}") for n in range(20)])
    with pytest.raises(UserError, match="a worker process was killed"):
        packed_quietly(source, tmp_path / "s", PackOptions(8, shard_size="4"), workers=2)
    packed_quietly(source, tmp_path / "s", PackOptions(8, shard_size="4"), workers=1)
    assert len(keys_of(tmp_path / "s")["train"]) == 20


def test_the_fingerprint_follows_the_content(packed):
    manifest = load_manifest(FolderStore(packed))
    assert Manifest.from_bytes(manifest.to_bytes(), "x") == manifest
    raw = json.loads(manifest.to_bytes())
    del raw["checksum"]
    renamed = Manifest.from_bytes(json.dumps(raw | {"name": "other"}).encode(), "x")
    assert renamed.fingerprint == manifest.fingerprint == raw["fingerprint"]
    raw["shards"][0]["sha256"] = "0" * 64
    assert Manifest.from_bytes(json.dumps(raw).encode(), "x").fingerprint != manifest.fingerprint

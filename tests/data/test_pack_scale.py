"""Packing at the size of real data sets: kills at any moment, and millions of pictures in bounded memory."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from drawn import draw_folder
from processes import children, gone
from steps import die_before

from sivae_dist.data import pack_aside
from sivae_dist.data.pack import pack
from sivae_dist.data.pack_shard import PackOptions
from sivae_dist.data.pyramid import addresses_of
from sivae_dist.data.shard_read import load_index, load_manifest
from sivae_dist.data.sources.folder import FolderSource, shared_stems
from sivae_dist.data.sources.listing import SortedNames
from sivae_dist.data.store import FolderStore
from sivae_dist.errors import UserError

OPTIONS = PackOptions((16, 64), format="png", shard_size="6", val_count=9)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def quietly(raw: Path, destination: Path) -> None:
    try:
        pack(FolderSource(raw), destination, OPTIONS, workers=2, progress=False)
    except UserError as error:
        assert "a worker process was killed" in error.what
        os._exit(1)


def pack_in_a_child(raw: Path, destination: Path) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=quietly, args=(raw, destination))
    process.start()
    return process


def kill_until_done(raw: Path, destination: Path, dice: random.Random, longest: float) -> int:
    """Packs with kills after random times: of the packer, of a worker, or of all. Gives how many kills there were."""
    kills = 0
    while True:
        process = pack_in_a_child(raw, destination)
        time.sleep(dice.uniform(0, longest))
        if not process.is_alive():
            process.join()
            assert process.exitcode == 0
            if kills:
                return kills
            longest /= 2  # on this machine it is faster than thought
            shutil.rmtree(destination)
            continue
        workers = children(process.pid)
        whom = dice.choice(["packer", "worker", "all"]) if workers else "packer"
        victims = {"packer": [process.pid], "worker": sorted(workers)[:1], "all": [process.pid, *workers]}[whom]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):  # it just ended by itself
                os.kill(pid, signal.SIGKILL)
        if whom == "worker":
            process.join(240)  # long: a busy disk may take its time for every fsync
            assert not process.is_alive(), "it hangs when a worker is killed"
        process.kill()
        process.join()
        kills += 1
        assert gone(workers), "orphaned workers end"
        longest *= 1.1  # so that it ends


@pytest.mark.dist
@pytest.mark.parametrize(
    ("pictures", "rounds"), [(60, 1), pytest.param(200, 12, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_kills_at_random_moments_lose_and_double_nothing(tmp_path, monkeypatch, pictures, rounds):
    monkeypatch.setattr(pack_aside, "_WAIT_S", 60.0)
    raw = draw_folder(tmp_path / "raw", pictures, size=120)
    (raw / "0003.png").write_bytes(b"damaged")
    begin = time.monotonic()
    pack(FolderSource(raw), tmp_path / "clean", OPTIONS, workers=2, progress=False)
    undisturbed = time.monotonic() - begin
    expected, kills = tree(tmp_path / "clean"), 0
    for number in range(rounds):
        kills += kill_until_done(raw, tmp_path / "killed", random.Random(number), 0.7 * undisturbed)
        assert tree(tmp_path / "killed") == expected
        for level in addresses_of(str(tmp_path / "killed")):
            store = FolderStore(Path(level))
            manifest = load_manifest(store)
            keys = [key for shard in manifest.shards for key in load_index(store, shard, 0).keys]
            assert sorted(keys) == [f"{n:04d}" for n in range(pictures) if n != 3]
        shutil.rmtree(tmp_path / "killed")
    print(f"{kills} kills in {rounds} packings")


def pack_until(step: int, raw: Path, destination: Path, options: PackOptions) -> None:
    die_before(step, destination)
    pack(FolderSource(raw), destination, options, workers=1, progress=False)


@pytest.mark.dist
@pytest.mark.parametrize("resolution", [16, (16, 32)])
def test_a_kill_before_any_step_leaves_nothing_behind(tmp_path, resolution):
    options = PackOptions(resolution, format="png", shard_size="4", val_count=2)
    raw = draw_folder(tmp_path / "raw", 10)
    (raw / "0003.png").write_bytes(b"damaged")
    pack(FolderSource(raw), tmp_path / "clean", options, workers=1, progress=False)
    expected, step, ended = tree(tmp_path / "clean"), 0, None
    while ended != 0:
        step += 1
        process = multiprocessing.get_context("fork").Process(
            target=pack_until, args=(step, raw, tmp_path / "killed", options)
        )
        process.start()
        process.join()
        ended = process.exitcode
        assert ended in (0, -signal.SIGKILL)
        pack(FolderSource(raw), tmp_path / "killed", options, workers=1, progress=False)
        assert tree(tmp_path / "killed") == expected, f"killed before step {step}"
        assert not (tmp_path / "killed" / ".pack").exists()
        shutil.rmtree(tmp_path / "killed")
    assert step > 25


def test_names_come_in_order_however_they_are_stored(monkeypatch):
    dice = random.Random(0)
    names = {f"{dice.choice(['a', 'Z', 'é', chr(0xDC80)])}{dice.randrange(10**6)}.png" for _ in range(500)}
    monkeypatch.setattr("sivae_dist.data.sources.listing._RUN", 17)
    found = SortedNames(dice.sample(sorted(names), len(names)))
    assert list(found) == list(found) == sorted(names)
    assert list(SortedNames([])) == []
    shared = shared_stems(SortedNames(["a.png", "a-1.png", "a.jpg.png", "a.jpg", "b.PNG", "b.png", "c.png"]))
    assert [stem for stem in ("a", "a-1", "a.jpg", "b", "c", "d") if shared(stem)] == ["a", "b"]


def test_a_folder_is_read_once(tmp_path, monkeypatch):
    raw = draw_folder(tmp_path / "raw", 5)
    draw_folder(raw / "sub", 5)
    read, real = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (read.append(str(path)), real(path))[1])
    assert len(list(FolderSource(raw).items())) == 10
    assert len(read) == len(set(read)) == 2


def test_a_large_folder_tells_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("sivae_dist.data.sources.listing._TOLD_EVERY", 2)
    source, told = FolderSource(draw_folder(tmp_path, 5)), []
    source.tell = told.append
    assert len(list(source.items())) == 5
    assert told == [2, 4]


MILLIONS = """
import os, sys
from pathlib import Path
from sivae_dist.data import pack
from sivae_dist.data.pack_items import list_items
from sivae_dist.data.pack_shard import PackOptions
from sivae_dist.data.sources import listing
from sivae_dist.data.sources.folder import FolderSource

count, folder = int(sys.argv[1]), Path(sys.argv[2])

class Entry:
    def __init__(self, name): self.name = name
    def is_symlink(self): return False
    def is_dir(self): return False
    def is_file(self): return True

class Entries:
    # Names as LSUN's pictures have them, in an order that is not that of the names.
    def __init__(self, path): pass
    def __enter__(self): return (Entry(f"{(n * 0x9E3779B97F4A7C15) % 2**64:016x}{n:024x}.webp") for n in range(count))
    def __exit__(self, *_): pass

def peak():  # of this program; getrusage would tell that of the one which started it, if that was larger
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

before = peak()
os.scandir = Entries
items = list_items(FolderSource(folder), folder / "items.jsonl", val_fraction=0.01, val_count=0)
tasks = pack._tasks(items, PackOptions(256), (25e3,))
assert len(items) == count
print(len(tasks), round(before), round(peak()))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_million_pictures_are_listed_and_planned_in_bounded_memory(tmp_path):
    """Of these, 220 MiB are the imports, torch's above all; the names alone have 129 MiB."""
    command = [sys.executable, "-c", MILLIONS, "3000000", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shards, before, peak = map(int, done.stdout.split())
    print(json.dumps({"shards": shards, "imports_mib": before, "peak_mib": peak}))
    assert shards > 2900
    assert peak < 600
    assert peak - before < 350

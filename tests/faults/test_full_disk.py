"""A disk that fills up, a real small one: it is told, nothing finished is lost, and after making room it goes on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_disk
from commands import Done, Runner, ended, refused, start, write_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

from web import serving

MODEL = {"channels": [16, 32], "zdim": 16}  # about 0.8 MB a checkpoint


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """Runs commands where file systems can be mounted; what is mounted there is seen only there."""
    prefix = small_disk.way()
    if prefix is None:
        pytest.skip("mounting a tmpfs is not allowed here, not even in a user namespace")
    runner = Runner(tmp_path_factory.mktemp("inside"), prefix)
    yield runner
    runner.close()


class Disk:
    """A mounted tmpfs."""

    def __init__(self, run: Runner, path: Path, size: str) -> None:
        self.run, self.path = run, path
        path.mkdir()
        self.shell(f"mount -t tmpfs -o size={size} tmpfs {path}")

    def shell(self, text: str) -> str:
        done: Done = self.run(shell=text)
        assert done.status == 0, done
        return done.stdout

    def fill(self, *, but_kb: int) -> None:
        left = f"$(( ($(df --output=avail -k {self.path} | tail -1) - {but_kb}) * 1024 ))"
        self.shell(f"head -c {left} /dev/zero > {self.path}/filler")

    def make_room(self) -> None:
        self.shell(f"rm {self.path}/filler")

    def list(self, below: str) -> set[str]:
        return set(self.shell(f"ls -A {self.path}/{below}").split())


@pytest.mark.parametrize("background", [True, False])
def test_while_a_checkpoint_is_written(inside: Runner, packed: Path, tmp_path: Path, background: bool) -> None:
    changes = {"model": MODEL, "checkpoint": {"background": background}, "tracking": {"tensorboard": True}}
    config = write_config(tmp_path / "c.yaml", packed, **changes)
    disk = Disk(inside, tmp_path / "disk", "6m")
    command = ("train", "--config", config, "--out", disk.path / "run")
    assert inside(*command, "--train.kimg", 0.02).status == 0
    disk.fill(but_kb=300)  # no further checkpoint fits
    for _ in range(2):
        refused(inside(*command), "No space left on device", "run the same command again")
        # The good one stays, and nothing half done does.
        assert disk.list("run/checkpoints") == {"nimg-000000020", "latest"}
    assert disk.shell(f"cat {disk.path}/run/checkpoints/latest").strip() == "nimg-000000020"
    disk.make_room()
    done = inside(*command)
    assert done.status == 0, done
    assert "nimg-000000060" in disk.list("run/checkpoints")
    assert '"finished": true' in disk.shell(f"cat {disk.path}/run/summary.json")


@pytest.mark.parametrize("left_kb", [0, 8, 40])
def test_no_room_at_all(inside: Runner, packed: Path, tmp_path: Path, left_kb: int) -> None:
    """Whatever is written first fails: the lock's text, the folders, the metrics, TensorBoard's file."""
    config = write_config(tmp_path / "c.yaml", packed, tracking={"tensorboard": True})
    disk = Disk(inside, tmp_path / "disk", "1m")
    disk.fill(but_kb=left_kb)
    refused(inside("train", "--config", config, "--out", disk.path / "run"), "No space left on device")
    disk.make_room()
    assert inside("train", "--config", config, "--out", disk.path / "run").status == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_while_a_shard_is_written(inside: Runner, tmp_path: Path, workers: int) -> None:
    disk = Disk(inside, tmp_path / "disk", "2m")
    options = ("--count", 48, "--val-count", 0, "--shard-size", 8, "--workers", workers)
    command = ("data", "scenes", disk.path / "out", *options)
    disk.fill(but_kb=160)
    refused(inside(*command), "GB free", "are needed", "another disk")
    refused(inside(*command, unwarned=True), "cannot be written: No space left on device", "finished shards are kept")
    # Finished is what has a note; with two workers a shard may be there whose note found no room.
    finished = sum(name.endswith(".done") for name in disk.list("out/.pack"))
    found = disk.list("out")
    assert 0 < finished <= sum(name.endswith(".tar") for name in found) < 6
    assert "manifest.json" not in found
    assert not [name for name in disk.list("out/.pack") if "tmp" in name]
    disk.make_room()
    done = inside(*command)
    assert done.status == 0, done
    assert f"{finished} shards were finished before" in done.stdout
    assert "48 of 48 samples in 6 shards are good" in inside("data", "verify", disk.path / "out", "--workers", 1).stdout


def test_a_disk_that_may_not_be_written(inside: Runner, packed: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", packed)
    disk = Disk(inside, tmp_path / "disk", "2m")
    folders = "run run/{tensorboard,samples,checkpoints,logs}"
    disk.shell(f"cd {disk.path}; mkdir {folders}; mount -o remount,ro {disk.path}")
    for name in ("new", "run"):
        refused(inside("train", "--config", config, "--out", disk.path / name), "Read-only file system", "--out")
    refused(inside("data", "scenes", disk.path / "out", "--resolution", 16), "Read-only file system")


def test_tensorboards_thread_leaves_the_telling_to_the_run() -> None:
    """Its thread meets the full disk first; the next call raises what it met, and nothing else is printed."""
    code = (
        "import sys, threading, time; from sivae_dist.engine import tracking\n"
        "from tensorboard.summary.writer.event_file_writer import _AsyncWriter, RecordWriter\n"
        "threading.excepthook = tracking._told_elsewhere\n"
        "writer = _AsyncWriter(RecordWriter(open('/dev/full', 'wb', 0)), flush_secs=0)\n"
        "writer.write(b'x'); writer._worker.join(10)\n"
        "try: writer.write(b'x')\n"
        "except OSError as error: print(error.strerror)\n"
        "other = threading.Thread(target=lambda: 1 / 0); other.start(); other.join()\n"
    )
    process = start("-c", code)
    done = ended(process, 60)
    assert done.stdout == "No space left on device\n", done
    assert done.stderr.count("Traceback") == 1 and "ZeroDivisionError" in done.stderr  # other threads' are shown


def test_under_the_data_cache(inside: Runner, packed: Path, tmp_path: Path) -> None:
    """The run goes on without it, says so once, and counts."""
    disk = Disk(inside, tmp_path / "disk", "1m")
    disk.fill(but_kb=8)
    with serving(packed) as web:
        data = {"cache_dir": str(disk.path / "cache"), "cache_gb": 0.1, "workers": 2}
        config = write_config(tmp_path / "c.yaml", web.url, data=data)
        done = inside("train", "--config", config, "--out", tmp_path / "run")
    assert done.status == 0, done
    assert "cannot write the data cache" in done.stderr
    assert "No space left on device" in done.stderr
    assert done.stderr.count("cannot write the data cache") == 1
    assert done.stderr.count("has room for") == 1 and "Make room, or set data.cache_dir" in done.stderr, (
        "told at the start, too"
    )
    assert "data/cache_refused" in (tmp_path / "run/metrics.jsonl").read_text()

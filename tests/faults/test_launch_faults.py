"""Several ranks of which one fails: all end soon, the message is shown once, and nobody waits for the timeout."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, SMALL, Runner, checkpoints, environment, start, until, write_config

from sivae_dist.data.manifest import Manifest, ShardInfo
from sivae_dist.data.plan import Plan

pytestmark = pytest.mark.dist


def launch(ranks: int, *options: object) -> subprocess.Popen[str]:
    """`accelerate launch` of training on CPU ranks."""
    flags = ["--quiet", "--config_file", str(ROOT / "launch/accelerate/cpu-2.yaml"), "--num_processes", str(ranks)]
    command = ["-m", "accelerate.commands.launch", *flags, "-m", "sivae_dist.train", *map(str, options)]
    return start(*command, env={"ACCELERATE_USE_CPU": "true"})


def ended(process: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    """Status and output; a launch that hangs fails here. No frame of ours may stand in a traceback: the launcher's own
    one, which tells that a process ended badly, is not ours to change."""
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"hangs: {process.communicate()}") from None
    assert not re.search(r'File ".*sivae_dist', stdout + stderr), stderr
    return process.returncode, stdout + stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model.image_size", 18], "model.image_size is 18"),
        pytest.param(["--train.bacth", 3], "--train.batch", marks=pytest.mark.slow),
        pytest.param(["--distributed.ranks", 3], "is 3, but 2 processes started", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_of_all_ranks_is_told_once(config: Path, tmp_path: Path, options: list, says: str) -> None:
    status, output = ended(launch(2, "--config", config, "--out", tmp_path / "run", *options), 90)
    assert status != 0
    assert output.count(says) == 1, output


def test_a_mistake_of_rank_0_alone(config: Path, tmp_path: Path) -> None:
    """The others are already waiting in a collective for what it will never send."""
    (tmp_path / "file").write_text("in the way")
    status, output = ended(launch(2, "--config", config, "--out", tmp_path / "file"), 90)
    assert status != 0
    assert output.count("cannot write the run folder") == 1, output
    assert output.count("error (rank 0)") == 1 and "rank 1" not in output.partition("Traceback")[0], output


def test_a_rank_whose_data_break_in_the_loop(shards: Path, tmp_path: Path) -> None:
    """Rank 1 owns the odd lanes; a shard goes bad under both after the start, and whoever meets it first tells."""
    options = {"data": {"workers": 0}, "train": {"kimg": 500.0}, "checkpoint": {"every_kimg": 0.05}}
    config = write_config(tmp_path / "c.yaml", shards, **options)
    process = launch(2, "--config", config, "--out", tmp_path / "run", "--distributed.timeout_s", 301)
    until(lambda: checkpoints(tmp_path / "run") or process.poll() is not None, 90)
    for path in shards.glob("*.tar"):
        data = path.read_bytes()
        with open(path, "r+b") as file:  # in place: the ranks have it open
            file.seek(600)
            file.write(bytes(len(data) - 600))
    begin = time.monotonic()
    status, output = ended(process, 60)
    assert status != 0
    assert time.monotonic() - begin < 40
    assert 1 <= output.count("checksum differs") <= 2, output
    assert "another rank has gone" not in output
    assert checkpoints(tmp_path / "run")


def test_one_rank_has_bad_data_and_all_save_first(run: Runner, shards: Path, tmp_path: Path) -> None:
    """The image at position 25 stands in an odd lane: only rank 1 reads it, for the third batch. What two batches made
    is in a checkpoint, the same as that of a run that was to end there; with the shard mended a run goes on from it."""
    shard, number = (int(a[0]) for a in plan_of(shards).locate(np.array([25])))
    name = infos_of(shards)[shard].name
    row = json.loads((shards / f"{name}.index").read_text().splitlines()[1 + number])
    changes = {"checkpoint": {"every_kimg": 100}}
    config = write_config(tmp_path / "c.yaml", shards, **changes)
    whole = launch(2, "--config", config, "--out", tmp_path / "whole", "--train.kimg", 0.02)
    assert ended(whole, 90)[0] == 0
    good = (shards / f"{name}.tar").read_bytes()
    bad = bytearray(good)
    bad[row[1] + row[2] // 2] ^= 0x10
    (shards / f"{name}.tar").write_bytes(bad)
    status, output = ended(launch(2, "--config", config, "--out", tmp_path / "run"), 90)
    assert status != 0
    assert output.count("checksum differs") == 1 and output.count("error (rank 1)") == 1, output
    assert "rank 0" not in output.partition("Traceback")[0], output
    assert checkpoints(tmp_path / "run") == checkpoints(tmp_path / "whole") == ["nimg-000000020"]
    for file in ("weights", "ema", "optimizer"):
        one, two = (tmp_path / r / f"checkpoints/nimg-000000020/{file}.safetensors" for r in ("run", "whole"))
        assert one.read_bytes() == two.read_bytes()
    (shards / f"{name}.tar").write_bytes(good)
    done = run("train", "--config", config, "--out", tmp_path / "run")
    assert done.status == 0, done
    assert checkpoints(tmp_path / "run")[-1] == "nimg-000000060"


def infos_of(shards: Path) -> tuple[ShardInfo, ...]:
    return Manifest.from_bytes((shards / "manifest.json").read_bytes(), "manifest").of("train")


def plan_of(shards: Path) -> Plan:
    """That of a run with the small configuration."""
    return Plan([i.count for i in infos_of(shards)], lanes=SMALL["data"]["lanes"], window=SMALL["data"]["window"])


@pytest.mark.slow
def test_a_killed_rank_ends_the_others(packed: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", packed, train={"kimg": 500.0})
    process = launch(2, "--config", config, "--out", tmp_path / "run", "--distributed.timeout_s", 301)
    until(lambda: checkpoints(tmp_path / "run") or process.poll() is not None, 90)
    found = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    ranks = [int(line.split()[0]) for line in found.splitlines() if line.split()[1] == str(process.pid)]
    os.kill(ranks[-1], signal.SIGKILL)
    status, output = ended(process, 60)
    assert status != 0
    assert output.count("another rank has gone or did not answer") <= 1, output
    assert checkpoints(tmp_path / "run")


@pytest.mark.slow
def test_dry_run_of_two_ranks(config: Path, tmp_path: Path) -> None:
    status, output = ended(launch(2, "--config", config, "--out", tmp_path / "run", "--dry-run"), 90)
    assert status == 0, output
    assert output.count("dry run: nothing is written") == 1
    assert "2 ranks on cpu" in output and "(5 images)" in output
    assert not (tmp_path / "run").exists()


def test_a_watcher_ends_a_rank_that_waits(tmp_path: Path) -> None:
    """Without anything that breaks its connections: the rank only waits, as in a collective on GPUs."""
    code = (
        "import os, sys, time; import torch.distributed as dist; from sivae_dist.distributed import failure\n"
        "rank = int(os.environ['RANK']); dist.init_process_group('gloo', rank=rank, world_size=2)\n"
        "failure.watch()\n"
        "if rank: print(failure.announce('broken'), failure.announce('broken'), flush=True); os._exit(2)\n"
        "time.sleep(300)\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in (0, 1):
        env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(
            subprocess.Popen([sys.executable, "-c", code], env=environment(env), stdout=subprocess.PIPE, text=True)
        )
    assert processes[1].communicate(timeout=60)[0].split() == ["True", "False"]  # told once
    assert processes[0].wait(timeout=20) == 2

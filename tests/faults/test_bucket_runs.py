"""Whole training runs whose shards lie in object stores (on loopback): stopped, resumed, and the same in the end."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from commands import ROOT, Runner, checkpoints, ended, start, until, write_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

from buckets import serving_bucket

pytestmark = pytest.mark.slow

LONG = {"train": {"kimg": 0.4}, "checkpoint": {"every_kimg": 0.05}}
TWO = ("--quiet", "--config_file", str(ROOT / "launch/accelerate/cpu-2.yaml"), "--num_processes", "2")


def weights(run: Path) -> dict[str, bytes]:
    last = run / "checkpoints" / checkpoints(run)[-1]
    return {path.name: path.read_bytes() for path in sorted(last.glob("*.safetensors"))}


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "mem/", "data/"))} for row in rows(run)]


def remote_config(path: Path, url: str, tmp_path: Path) -> Path:
    data = {"cache_dir": str(tmp_path / "cache"), "cache_gb": 0.01, "workers": 2}
    return write_config(path, url, data=data, **LONG)


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_one_rank_asked_to_stop(run: Runner, packed: Path, tmp_path: Path, kind: str) -> None:
    local = write_config(tmp_path / "local.yaml", packed, **LONG)
    done = run("train", "--config", local, "--out", tmp_path / "local")
    assert done.status == 0, done
    with serving_bucket(kind, packed) as bucket:
        config = remote_config(tmp_path / "remote.yaml", bucket.url, tmp_path)
        command = ("train", "--config", str(config), "--out", str(tmp_path / "run"))
        process = start("-m", "sivae_dist", *command, env=bucket.env)
        until(lambda: process.poll() is not None or checkpoints(tmp_path / "run"))
        process.send_signal(signal.SIGTERM)
        first = ended(process)
        assert first.status == 0 and "the same command goes on from here" in first.stdout, first
        assert json.loads((tmp_path / "run/summary.json").read_text())["nimg"] < 400
        done = run(*command, env=bucket.env)
        assert done.status == 0, done
    assert weights(tmp_path / "run") == weights(tmp_path / "local")
    assert losses(tmp_path / "run")[-1] == losses(tmp_path / "local")[-1]
    last = rows(tmp_path / "run")[-2:]
    assert any(row.get("data/fetched_bytes", 0) > 0 for row in last), "it did read from there"
    assert any(row.get("data/cache_hits", 0) > 0 for row in last)


@pytest.mark.dist
def test_two_ranks_that_are_killed(packed: Path, tmp_path: Path) -> None:
    """Nothing is saved at a kill: the run goes on from the last checkpoint, and its blocks are still in the cache."""
    launch = ("-m", "accelerate.commands.launch", *TWO, "-m", "sivae_dist.train")
    cpu = {"ACCELERATE_USE_CPU": "true"}
    local = write_config(tmp_path / "local.yaml", packed, **LONG)
    done = ended(start(*launch, "--config", str(local), "--out", str(tmp_path / "local"), env=cpu), 200)
    assert done.status == 0, done
    with serving_bucket("gs", packed) as bucket:
        config = remote_config(tmp_path / "remote.yaml", bucket.url, tmp_path)
        command = (*launch, "--config", str(config), "--out", str(tmp_path / "run"))
        process = start(*command, env=cpu | bucket.env)
        until(lambda: process.poll() is not None or checkpoints(tmp_path / "run"), 200)
        os.killpg(process.pid, signal.SIGKILL)
        killed = ended(process)
        assert killed.status == -signal.SIGKILL, killed
        done = ended(start(*command, env=cpu | bucket.env), 200)
        assert done.status == 0, done
    assert weights(tmp_path / "run") == weights(tmp_path / "local")

"""A launcher that a signal kills takes its training along: a checkpoint, no orphan, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, Done, Runner, checkpoints, ended, environment, start, until, write_config
from test_interrupts import trained_in

from sivae_dist.distributed.launcher import OWN

LAUNCHER = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
RANK = """
import os, time
from sivae_dist.distributed import launcher
from sivae_dist.engine.stopping import StopSignals
parent = launcher.remember()
with StopSignals() as stop:
    print(stop.asked_by_now(), flush=True)
    while os.getppid() == parent:
        time.sleep(0.01)
    print(stop.asked_by_now(), flush=True)
"""
BY_HAND = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
BY_ACCELERATE = BY_HAND | {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default"}
BY_TORCHELASTIC = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}


@pytest.mark.parametrize(
    ("variables", "asked"),
    [(BY_ACCELERATE, True), (BY_TORCHELASTIC, True), ({OWN: "1"}, True), (BY_HAND, False)],
    ids=["accelerate", "torchelastic", "a command of ours", "exported by hand"],
)
def test_only_the_end_of_a_launcher_asks_for_a_stop(variables: dict[str, str], asked: bool) -> None:
    """Not that of the shell in which `nohup sivae-dist train &` was typed."""
    clean = {k: v for k, v in environment().items() if not k.startswith(("ACCELERATE", "TORCHELASTIC"))}
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, sys.executable, "-c", RANK],
        env=clean | variables,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "False\n"
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=30)[0] == f"{asked}\n"
    assert process.returncode == -signal.SIGUSR1


def launched(ranks: int, config: Path, run: Path) -> subprocess.Popen[str]:
    """`accelerate launch` of training on the CPU, as in README.md."""
    file = "single.yaml" if ranks == 1 else "cpu-2.yaml"
    flags = ["--config_file", str(ROOT / "launch/accelerate" / file)]
    command = ["-m", "accelerate.commands.launch", *flags, "-m", "sivae_dist.train", "--config", str(config)]
    return start(*command, "--out", str(run), env={"ACCELERATE_USE_CPU": "true"})


def signalled_in_the_loop(process: subprocess.Popen[str], number: signal.Signals, run: Path, rows: int) -> Done:
    """Once there are so many rows of metrics: the signal to the launcher alone, and the end of all processes."""
    metrics = run / "metrics.jsonl"
    try:
        until(lambda: process.poll() is not None or (metrics.is_file() and metrics.read_text().count("\n") >= rows), 90)
        assert process.poll() is None, ended(process)
        os.kill(process.pid, number)
        until(lambda: not trained_in(run))
    finally:
        for pid in trained_in(run):
            os.kill(pid, signal.SIGKILL)
    return ended(process)


@pytest.fixture
def long(packed: Path, tmp_path: Path) -> Path:
    """A run that saves nothing unless it is asked to."""
    return write_config(tmp_path / "c.yaml", packed, train={"kimg": 500.0}, checkpoint={"every_kimg": 1000.0})


def stopped_at(run: Path) -> int:
    nimg = json.loads((run / "summary.json").read_text())["nimg"]
    assert checkpoints(run)[-1] == f"nimg-{nimg:09d}"
    return int(nimg)


@pytest.mark.dist
@pytest.mark.slow
def test_one_process_saves_and_goes_on(long: Path, tmp_path: Path) -> None:
    run, ends = tmp_path / "run", [0]
    for number in (signal.SIGTERM, signal.SIGUSR1):
        rows = (run / "metrics.jsonl").read_text().count("\n") if ends[-1] else 0
        done = signalled_in_the_loop(launched(1, long, run), number, run, rows + 2)
        assert done.status == -number, done
        assert "the same command goes on from here" in done.stdout and "Traceback" not in done.output, done
        assert "the launcher has ended" in (run / "logs/rank-0.log").read_text()
        ends.append(stopped_at(run))
    assert 0 < ends[1] < ends[2]


@pytest.mark.dist
@pytest.mark.slow
def test_several_processes_save_and_go_on(run: Runner, long: Path, tmp_path: Path) -> None:
    """SIGUSR1 kills torchelastic's agent, and the store through which the ranks met with it."""
    folder = tmp_path / "run"
    done = signalled_in_the_loop(launched(2, long, folder), signal.SIGUSR1, folder, 2)
    assert done.status == -signal.SIGUSR1, done
    assert "the same command goes on from here" in done.stdout, done
    nimg = stopped_at(folder)
    again = run("train", "--config", long, "--out", folder, "--train.kimg", nimg / 1000 + 0.02)
    assert again.status == 0, again
    assert stopped_at(folder) == nimg + 20

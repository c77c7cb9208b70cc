"""Ctrl-C and SIGTERM at any moment: no traceback, and status 130, 143 or a saved checkpoint. As processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
from commands import Runner, checkpoints, ended, start, until, write_config

INTERRUPTED, TERMINATED = 130, 143


def control_c(process) -> None:
    """As a terminal does: to the whole group, data workers included."""
    os.killpg(process.pid, signal.SIGINT)


def imports_torch(pid: int) -> bool:
    try:
        return "torch" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("module", ["sivae_dist.train", pytest.param("sivae_dist", marks=pytest.mark.slow)])
def test_while_packages_are_imported(config: Path, tmp_path: Path, module: str) -> None:
    words = ["train"] if module == "sivae_dist" else []
    process = start("-m", module, *words, "--config", str(config), "--out", str(tmp_path / "run"))
    until(lambda: imports_torch(process.pid) or process.poll() is not None)
    control_c(process)
    done = ended(process, 20)
    assert (done.status, done.output) == (INTERRUPTED, "interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.3, 0.6, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0])
def test_at_any_moment_of_the_start(config: Path, tmp_path: Path, delay: float) -> None:
    process = start("-m", "sivae_dist", "train", "--config", str(config), "--out", str(tmp_path / "run"))
    until(lambda: b"sivae_dist" in Path(f"/proc/{process.pid}/cmdline").read_bytes())
    time.sleep(delay)
    if process.poll() is not None:
        return
    control_c(process)
    done = ended(process, 30)
    assert "Traceback" not in done.output, done
    assert done.status == INTERRUPTED or checkpoints(tmp_path / "run"), done


@pytest.fixture
def going(packed: Path, tmp_path: Path):
    """A long run of large checkpoints that has begun to train."""
    changes = {"train": {"kimg": 500.0}, "data": {"workers": 2}, "checkpoint": {"every_kimg": 100.0}}
    config = write_config(tmp_path / "c.yaml", packed, **changes)
    process = start("-m", "sivae_dist", "train", "--config", str(config), "--out", str(tmp_path / "run"))
    metrics = tmp_path / "run/metrics.jsonl"
    until(lambda: process.poll() is not None or (metrics.is_file() and metrics.read_text().count("\n") > 1))
    assert process.poll() is None, ended(process)
    return process, tmp_path / "run"


def test_once_in_the_loop(going) -> None:
    process, folder = going
    control_c(process)
    done = ended(process, 30)
    assert done.status == 0, done
    assert "Traceback" not in done.output
    stopped_at = json.loads((folder / "summary.json").read_text())["nimg"]
    assert checkpoints(folder) == [f"nimg-{stopped_at:09d}"]
    assert "the same command goes on from here" in done.stdout


def test_again_and_again_in_the_loop(going) -> None:
    process, folder = going
    for _ in range(6):
        control_c(process)
        time.sleep(0.02)
    done = ended(process, 30)
    assert "Traceback" not in done.output, done
    assert done.status == INTERRUPTED or checkpoints(folder), done


def test_while_packing(run: Runner, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ["--resolution", "256", "--shard-size", "20", "--workers", "2"]
    process = start("-m", "sivae_dist", "data", "scenes", str(out), "--count", "4000", *options)
    until(lambda: list(out.glob("*.tar")) or process.poll() is not None)
    control_c(process)
    done = ended(process, 30)
    assert done.status == INTERRUPTED, done
    assert "Traceback" not in done.output and done.stderr.endswith("interrupted\n")
    assert not list((out / ".pack").glob("*.tmp"))
    finished = len(list((out / ".pack").glob("*.done")))
    assert 0 < finished < 200
    # Only the number of scenes differs: the folder knows what it was.
    other = run("data", "scenes", out, "--count", 4001, *options)
    assert other.status == 2 and "partly packed, with other options" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)])
def test_runs_that_another_command_started_save_and_end_with_it(tmp_path: Path, number: int, status: int) -> None:
    words = ["--density", "rings", "--objective", "vae", "soft_introvae", "--seeds", "1", "--jobs", "2"]
    process = start("-m", "sivae_dist", "toy", *words, "--out", str(tmp_path))
    runs = [tmp_path / f"rings-{name}-seed0" for name in ("vae", "soft_introvae")]

    def under_way() -> bool:
        return all((run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text()) > 0 for run in runs)

    until(lambda: process.poll() is not None or under_way())
    assert process.poll() is None, ended(process)
    os.kill(process.pid, number)
    done = ended(process)
    assert done.status == status and "Traceback" not in done.output, done
    left = trained_in(tmp_path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    assert all(checkpoints(run) for run in runs)


def trained_in(folder: Path) -> list[int]:
    """Processes of this machine whose command line names the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found

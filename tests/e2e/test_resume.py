"""A run killed at any instant and started again ends bit for bit as one that was never disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import ROOT, environment, final_files, results, sivae_dist

SYNCS_A_WRITE = 9  # five files, the folder, the parent, the parent once more after `latest`; one spare


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = sivae_dist("train", "--config", str(config), "--out", str(run))
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "summary.json").read_text())["finished"] is True
    return run


def assert_same_end(run: Path, undisturbed: Path) -> None:
    assert final_files(run) == final_files(undisturbed)
    assert results(run) == results(undisturbed)


@pytest.mark.dist
@pytest.mark.parametrize("fatal", [3, SYNCS_A_WRITE + 1, 2 * SYNCS_A_WRITE - 1, 3 * SYNCS_A_WRITE - 3])
def test_killed_while_writing_a_checkpoint(fatal: int, config: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable,
        str(Path(__file__).with_name("dies_in_write.py")),
        "--config",
        str(config),
        "--out",
        str(run),
    ]
    died = subprocess.run(
        command, env=environment({"DIE_AT_SYNC": str(fatal)}), cwd=ROOT, capture_output=True, check=False
    )
    assert died.returncode == -signal.SIGKILL
    done = sivae_dist("train", "--config", str(config), "--out", str(run))
    assert done.returncode == 0, done.stderr
    assert_same_end(run, undisturbed)


@pytest.mark.dist
def test_killed_at_random_moments(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    draw = random.Random(4)
    kills = 0
    for rows in (2, 5, 8):
        process = subprocess.Popen(
            [sys.executable, "-m", "sivae_dist", "train", "--config", str(config), "--out", str(run)],
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text().splitlines()) >= rows:
                time.sleep(draw.random() * 0.2)
                process.kill()
                kills += 1
                break
            time.sleep(0.01)
        process.wait()
    assert kills == 3
    done = sivae_dist("train", "--config", str(config), "--out", str(run))
    assert done.returncode == 0, done.stderr
    assert_same_end(run, undisturbed)


@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_saves_first(number: int, config: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "sivae_dist", "train", "--config", str(config), "--out", str(run)]
    process = subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (run / "metrics.jsonl").is_file():
        time.sleep(0.01)
    while process.poll() is None and len((run / "metrics.jsonl").read_text().splitlines()) < 3:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "the same command goes on from here" in out
    stopped_at = json.loads((run / "summary.json").read_text())["nimg"]
    assert 0 < stopped_at < 400
    assert (run / "checkpoints/latest").read_text().strip() == f"nimg-{stopped_at:09d}"
    assert sivae_dist("train", "--config", str(config), "--out", str(run)).returncode == 0
    assert_same_end(run, undisturbed)


@pytest.mark.dist
def test_resume_options(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    never = sivae_dist("train", "--config", str(config), "--out", str(undisturbed), "--resume", "never")
    assert never.returncode == 2
    assert "already holds a run" in never.stderr
    assert "Traceback" not in never.stderr
    first = sorted((undisturbed / "checkpoints").glob("nimg-*"))[0]
    run = tmp_path / "branch"
    done = sivae_dist("train", "--config", str(config), "--out", str(run), "--resume", str(first))
    assert done.returncode == 0, done.stderr
    assert final_files(run) == final_files(undisturbed)
    other = sivae_dist("train", "--config", str(config), "--out", str(undisturbed), "--model.zdim", "7")
    assert other.returncode == 2
    assert "zdim 6 (now 7)" in other.stderr
    longer = sivae_dist("train", "--config", str(config), "--out", str(run), "--train.kimg", "0.45")
    assert longer.returncode == 0, longer.stderr
    assert results(run)[-1]["nimg"] == 450


@pytest.mark.dist
@pytest.mark.slow
def test_a_killed_data_worker_saves_first(config: Path, tmp_path: Path) -> None:
    """Out of memory, for example: said in plain words, nothing lost, and the same command goes on to the same end."""
    long = ["--config", str(config), "--train.kimg", "2", "--checkpoint.every_kimg", "100"]
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    done = sivae_dist("train", *long, "--out", str(undisturbed))
    assert done.returncode == 0, done.stderr
    for rows in (2, 12):
        process = subprocess.Popen(
            [sys.executable, "-m", "sivae_dist", "train", *long, "--out", str(run)],
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text().splitlines()) >= rows:
                break
            time.sleep(0.005)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            if b"sivae_dist" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGKILL)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 2, told
        assert "a data worker process was killed" in told and "Traceback" not in told, told
        assert (run / "checkpoints/latest").is_file(), told
    done = sivae_dist("train", *long, "--out", str(run))
    assert done.returncode == 0, done.stderr
    assert_same_end(run, undisturbed)

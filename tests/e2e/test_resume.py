"""A run killed at any instant and started again ends bit for bit as one that was never disturbed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from running import ROOT, environment, final_files, results, sivae_dist

import sivae_dist as package
from sivae_dist.engine import checkpoint, resume
from sivae_dist.engine.config import from_dict, read_yaml
from sivae_dist.engine.run_folder import RunFolder
from sivae_dist.engine.trainer import Trainer
from sivae_dist.errors import UserError

SYNCS_A_WRITE = 7  # five files, the folder, the parent


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
@pytest.mark.parametrize("fatal", [3, SYNCS_A_WRITE, 2 * SYNCS_A_WRITE - 1, 3 * SYNCS_A_WRITE - 4])
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


def started_at(run: Path) -> int:
    nimg: int = json.loads((run / "manifest.json").read_text())["started_at_nimg"]
    return nimg


def test_the_same_command_with_a_checkpoint_loses_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--resume PATH starts there once: the same command again goes on from what it has trained since."""
    settings = from_dict(read_yaml(config), "test")
    settings = replace(settings, train=replace(settings.train, kimg=0.25))
    package.train(settings, tmp_path / "first")
    first, *_, last = checkpoint.complete(tmp_path / "first/checkpoints")
    run = tmp_path / "branch"
    package.train(settings, run, str(first))
    assert started_at(run) == checkpoint.nimg_of(first)
    assert final_files(run) == final_files(tmp_path / "first")
    newest, since = checkpoint.complete(run / "checkpoints")[-1], checkpoint.complete(run / "checkpoints")[-2]
    checkpoint.remove(newest)  # as if it had been stopped there
    resume.settle(RunFolder(run), since)
    package.train(settings, run, str(first))
    assert started_at(run) == checkpoint.nimg_of(since)
    assert final_files(run) == final_files(tmp_path / "first")
    checkpoint.remove(newest)
    resume.settle(RunFolder(run), since)
    shutil.rmtree(first)  # what is gone is still known by its name
    package.train(settings, run, str(first))
    assert started_at(run) == checkpoint.nimg_of(since)
    package.train(settings, run)  # and plain resumes keep what it came from
    assert checkpoint.read_state(newest)[resume.ORIGIN]["path"] == str(first.resolve())
    # Another setting is another course, which begins at PATH.
    other = replace(settings, optim=replace(settings.optim, decay=0.5))
    capsys.readouterr()
    package.train(other, run, str(last))
    assert started_at(run) == checkpoint.nimg_of(last)


def test_back_to_an_older_checkpoint_of_the_same_folder(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is newer belongs to a course that is given up: told, never gone on from, removed but for the best one."""
    values = read_yaml(config)
    values["checkpoint"] = {**values["checkpoint"], "keep_last": 9, "best": None}
    settings, run = from_dict({**values, "train": {"kimg": 0.3, "batch": 10}}, "test"), tmp_path / "run"
    package.train(settings, run)
    before = checkpoint.complete(run / "checkpoints")
    start, newer = before[1], before[2:]
    lower = replace(settings, optim=replace(settings.optim, encoder=replace(settings.optim.encoder, lr=1e-5)))
    trainer = Trainer(lower, run, str(start))
    trainer.release()
    assert checkpoint.latest(run / "checkpoints") == before[-1]  # nothing has begun
    resume.settle(trainer.folder, trainer.good)  # and is killed before its first checkpoint
    assert checkpoint.latest(run / "checkpoints") == start
    capsys.readouterr()
    short = replace(lower, train=replace(lower.train, kimg=(checkpoint.nimg_of(newer[0]) + 10) / 1000))
    package.train(short, run)
    told = capsys.readouterr().err
    assert started_at(run) == checkpoint.nimg_of(start)
    assert "note: going on from" in told and all(path.name in told for path in newer)
    after = checkpoint.complete(run / "checkpoints")
    assert after[:3] == [*before[:2], newer[0]]  # of the new course, though of the same name
    assert checkpoint.nimg_of(after[-1]) == checkpoint.nimg_of(newer[0]) + 10
    assert checkpoint.read_state(newer[0])["config"]["optim"]["encoder"]["lr"] == 1e-5
    summary = json.loads((run / "summary.json").read_text())
    assert int(Path(summary["grid"]).stem[5:]) <= summary["nimg"]


def test_a_mended_mistake_in_the_same_process_finds_the_folder_free(config: Path, tmp_path: Path) -> None:
    settings = from_dict(read_yaml(config), "test")
    wrong = replace(settings, model=replace(settings.model, image_size=32))  # type: ignore[call-arg]
    with pytest.raises(UserError, match="the data have shape 3 x 16 x 16") as kept:  # and its traceback the trainer
        package.train(wrong, tmp_path / "run")
    package.train(replace(settings, train=replace(settings.train, kimg=0.02)), tmp_path / "run")
    assert "the model takes" in str(kept.value)


def test_no_grids_where_none_are_wanted(config: Path, tmp_path: Path) -> None:
    settings = from_dict(read_yaml(config), "test")
    quiet = replace(settings, tracking=replace(settings.tracking, images_every_kimg=0))
    package.train(replace(quiet, train=replace(quiet.train, kimg=0.02)), tmp_path / "run")
    assert not list((tmp_path / "run/samples").glob("*"))
    assert json.loads((tmp_path / "run/summary.json").read_text())["grid"] is None


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

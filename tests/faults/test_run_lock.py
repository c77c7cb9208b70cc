"""Two runs in one folder at once: the second is refused, and a killed first one leaves no lock behind."""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path

import pytest
from commands import Runner, checkpoints, ended, refused, start, until


@pytest.fixture
def going(config: Path, tmp_path: Path):
    """A long run that has begun to train."""
    options = ["--config", str(config), "--out", str(tmp_path / "run"), "--train.kimg", "500"]
    process: subprocess.Popen[str] = start("-m", "sivae_dist", "train", *options)
    until(lambda: checkpoints(tmp_path / "run") or process.poll() is not None)
    assert process.poll() is None, ended(process)
    yield process, tmp_path / "run"
    if process.poll() is None:
        process.kill()
    process.wait()


def test_the_second_is_refused_and_the_first_goes_on(run: Runner, config: Path, going) -> None:
    process, folder = going
    done = run("train", "--config", config, "--out", folder)
    holder = f"process {process.pid} on {socket.gethostname()}"
    refused(done, f"another run is going on in {folder}", holder, "--out")
    dry = run("train", "--config", config, "--out", folder, "--dry-run", "--train.kimg", 500)
    assert dry.status == 0, dry  # it only reads
    # A kill gives the lock back at once, although the data workers of the first may live a moment longer.
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = folder / "checkpoints" / checkpoints(folder)[-1]
    done = run("train", "--config", config, "--out", folder, "--resume", newest)
    assert done.status == 0, done


def test_python_may_train_twice_in_a_folder(tmp_path: Path) -> None:
    """The lock is given back when a run ends, not only when its process does."""
    from sivae_dist.engine.run_lock import RunLock
    from sivae_dist.errors import UserError

    first = RunLock(tmp_path)
    with pytest.raises(UserError, match="another run is going on"):
        RunLock(tmp_path)
    first.release()
    RunLock(tmp_path).release()

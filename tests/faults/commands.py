"""Command lines as users type them: processes of their own, their exit status and all they print."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]

SMALL: dict[str, Any] = {
    "model": {"image_size": 16, "channels": [4, 8], "zdim": 6},
    "objective": {"beta_neg": 16.0},
    "data": {"workers": 1, "lanes": 8, "window": 16},
    "train": {"kimg": 0.06, "batch": 10},
    "checkpoint": {"every_kimg": 0.02},
    "tracking": {"every_kimg": 0.02, "images_every_kimg": 0, "images": 2, "progress": False, "tensorboard": False},
    "eval": {"every_kimg": 0, "at_start": False, "images": 8},
}


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "COLUMNS": "200", **(extra or {})}


class Runner:
    """Starts commands in processes forked from one that has done the imports; see fork_server.py."""

    def __init__(self, folder: Path, prefix: tuple[str, ...] = ()) -> None:
        self.folder, self.count = folder, itertools.count()
        self.server = subprocess.Popen(
            [*prefix, sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=ROOT,
        )

    def __call__(
        self, *arguments: object, env: dict[str, str] | None = None, seconds: float = 60, **special: Any
    ) -> Done:
        """Runs `sivae-dist ARGUMENTS`; a command that hangs fails here. special: see fork_server.py."""
        number = next(self.count)
        files = {name: str(self.folder / f"{number}.{name}") for name in ("stdout", "stderr")}
        order = {
            "arguments": [str(a) for a in arguments],
            "env": env or {},
            "cwd": str(self.folder),
            "seconds": seconds,
        }
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(order | files | special) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, "the fork server has died"
        texts = [Path(file).read_text(errors="replace") for file in files.values()]
        assert int(answer) != 124, f"hangs: {arguments}\n{texts}"
        return Done(int(answer), *texts)

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(timeout=60)


def refused(done: Done, *says: str, status: int = 2) -> None:
    """The command ended with this status and a message that says all this and how to mend it, without a traceback."""
    assert done.status == status, done
    assert "Traceback" not in done.output, done.output
    assert "fix: " in done.stderr, done.output
    for text in says:
        assert text in done.stderr, (text, done.stderr)


def write_config(path: Path, shards: Path | str, **changes: dict[str, Any]) -> Path:
    """The small configuration with some settings of some sections changed."""
    values = {section: {**settings, **changes.get(section, {})} for section, settings in SMALL.items()}
    values["data"]["url"] = str(shards)
    path.write_text(yaml.safe_dump({**values, **{k: v for k, v in changes.items() if k not in values}}))
    return path


def start(*command: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A process of its own session, to be sent signals."""
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment(env),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], seconds: float = 60) -> Done:
    """The end of a started process; one that hangs fails here."""
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        raise AssertionError(f"hangs: {process.args}\n{stdout}{stderr}") from None
    return Done(process.returncode, stdout, stderr)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Waits until something has happened."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def checkpoints(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").glob("nimg-*") if (p / "files.json").is_file())

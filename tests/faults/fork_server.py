"""Runs command lines of sivae-dist, each in a process of its own that is forked after the slow imports.

Reads one JSON object a line: {"arguments", "env", "cwd", "stdout", "stderr", "seconds"}; answers with the exit status.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import accelerate  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import sivae_dist.cli.data
import sivae_dist.cli.doctor
import sivae_dist.cli.evaluate
import sivae_dist.cli.scenes
import sivae_dist.cli.train
import sivae_dist.engine.trainer  # noqa: F401
from sivae_dist.cli import main


def child(order: dict) -> None:
    """Becomes the command; ends the interpreter as `python -m sivae_dist` does."""
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    sys.argv = ["sivae-dist", *order["arguments"]]
    main(order["arguments"])


def wait(pid: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 124


for line in sys.stdin:
    task = json.loads(line)
    child_pid = os.fork()
    if not child_pid:
        child(task)
        sys.exit(0)
    print(wait(child_pid, task["seconds"]), flush=True)

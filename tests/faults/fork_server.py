"""Runs command lines of sivae-dist, each in a process of its own that is forked after the slow imports.

Reads one JSON object a line: {"arguments", "env", "cwd", "stdout", "stderr", "seconds"}; answers with the exit status.
With "shell" instead of arguments it runs that text in bash (it may live where other file systems are mounted). With
"unwarned" the packer's look at the free space finds enough, as it does when others fill the disk later. With
"dies_before": [step, folder] it is killed right before that change of the folder; see steps.py.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import accelerate  # noqa: F401
import torch._dynamo
import torch.distributed.tensor
import torch.utils.flop_counter
import torch.utils.tensorboard  # noqa: F401

import sivae_dist.cli.data
import sivae_dist.cli.doctor
import sivae_dist.cli.evaluate
import sivae_dist.cli.scenes
import sivae_dist.cli.train
import sivae_dist.data.pack
import sivae_dist.data.sources.scenes
import sivae_dist.engine.dry_run
import sivae_dist.engine.trainer
from sivae_dist.cli import main

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

from steps import die_before


def child(order: dict) -> None:
    """Becomes the command, up to the end of its threads and exit functions; only freeing all memory is left out."""
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    if "shell" in order:
        os.execvp("bash", ["bash", "-euc", order["shell"]])
    if order.get("unwarned"):
        sivae_dist.data.pack._check_space = lambda *_: None
    if "dies_before" in order:
        step, folder = order["dies_before"]
        die_before(step, Path(folder), but="/tensorboard/")
    sys.argv = ["sivae-dist", *order["arguments"]]
    status = 0
    try:
        main(order["arguments"])
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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


sivae_dist.cli.train.parse([])  # loads every architecture, objective and dataset
gc.freeze()
for line in sys.stdin:
    task = json.loads(line)
    child_pid = os.fork()
    if not child_pid:
        child(task)
    print(wait(child_pid, task["seconds"]), flush=True)

"""The accelerate configurations in launch/accelerate start what their comments say, on CPU."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch" / "accelerate"
PROBE = Path(__file__).with_name("probe_ranks.py")


def start(config: str, out: Path, *flags: str, cpu: bool = True) -> subprocess.Popen[str]:
    """An `accelerate launch` of the probe, in a process group of its own."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / config), *flags]
    unset = ("ACCELERATE_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC", "NCCL_", "GLOO_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    # A default configuration in the home folder must not matter: there is none here.
    env |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(out / "home"), "CUDA_VISIBLE_DEVICES": ""}
    env |= {"ACCELERATE_USE_CPU": "true"} if cpu else {}
    return subprocess.Popen(
        [*command, str(PROBE), str(out)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def seen_by_ranks(launchers: list[subprocess.Popen[str]], out: Path) -> dict[int, dict[str, object]]:
    """What each rank wrote, once all launchers ended well."""
    try:
        for launcher in launchers:
            output, _ = launcher.communicate(timeout=180)
            assert launcher.returncode == 0, output
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
    return {int(path.stem): json.loads(path.read_text()) for path in out.glob("*.json")}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.dist
def test_single_is_one_process(tmp_path: Path) -> None:
    seen = seen_by_ranks([start("single.yaml", tmp_path, cpu=False)], tmp_path)
    assert seen == {0: {"processes": 1, "device": "cpu", "backend": None, "sum": 1.0}}


@pytest.mark.dist
def test_cpu_2_is_two_ranks_that_see_each_other(tmp_path: Path) -> None:
    seen = seen_by_ranks([start("cpu-2.yaml", tmp_path)], tmp_path)
    rank = {"processes": 2, "device": "cpu", "backend": "gloo", "sum": 3.0}
    assert seen == {0: rank, 1: rank}


@pytest.mark.dist
def test_multinode_joins_two_launchers(tmp_path: Path) -> None:
    flags = ["--num_machines", "2", "--num_processes", "2", "--main_process_port", free_port()]
    flags += ["--main_process_ip", "127.0.0.1", "--machine_rank"]
    launchers = [start("ddp-multinode.yaml", tmp_path, *flags, str(machine)) for machine in (0, 1)]
    rank = {"processes": 2, "device": "cpu", "backend": "gloo", "sum": 3.0}
    assert seen_by_ranks(launchers, tmp_path) == {0: rank, 1: rank}

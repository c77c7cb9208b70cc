"""`sivae-dist doctor`: things are broken for real, and it says which and what to do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import small_disk
from commands import ROOT, Done, Runner, environment, write_config

from sivae_dist.apps.checks import devices


def checks(done: Done) -> dict[str, dict[str, str]]:
    """The JSON report by name; where a name stands twice, the worst."""
    found: dict[str, dict[str, str]] = {}
    for check in json.loads(done.stdout):
        order = ["ok", "warning", "problem"]
        before = found.get(check["name"])
        if before is None or order.index(check["status"]) > order.index(before["status"]):
            found[check["name"]] = check
    return found


# Importing DeepSpeed takes longer than all the rest; all but one test let its place be taken by this.
_KEPT = tempfile.TemporaryDirectory(prefix="stand-in-")
STAND_IN = _KEPT.name
(Path(STAND_IN) / "deepspeed.py").write_text("__version__ = '0'\n")


ZERO = "distributed_type: DEEPSPEED\nnum_processes: 2"


def examine(
    run: Runner, *options: object, env: dict[str, str] | None = None, deepspeed: bool = False
) -> tuple[int, dict]:
    done = run("doctor", "--json", *options, env={**({} if deepspeed else {"PYTHONPATH": STAND_IN}), **(env or {})})
    assert "Traceback" not in done.output, done
    return done.status, checks(done)


def test_a_sound_machine(run: Runner, packed: Path, tmp_path: Path) -> None:
    """Every check gives a verdict; whatever is off has a remedy; the text says what the JSON says."""
    status, found = examine(run, "--data", packed, "--out", tmp_path, deepspeed=True)
    assert status == int(any(c["status"] == "problem" for c in found.values()))
    subjects = {
        "python",
        "torch",
        "accelerate",
        "c++ compiler",
        "nvcc",
        "ninja",
        "kernels, cpu",
        "gloo",
        "gpu decode",
        "nccl",
        "deepspeed",
    }
    assert subjects | {"accelerate config", "out folder", "/dev/shm", "open files", "threads", "data"} <= found.keys()
    assert all(c["remedy"] for c in found.values() if c["status"] != "ok")
    assert found["gloo"]["status"] == found["data"]["status"] == found["python"]["status"] == "ok"
    assert "48 samples of 16 px" in found["data"]["found"]
    text = run("doctor", "--out", tmp_path, env={"PYTHONPATH": STAND_IN})
    assert text.status == status
    assert text.stdout.splitlines()[-1].endswith(" problems")


def test_no_compiler(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ls").symlink_to(shutil.which("ls") or "/bin/ls")
    status, found = examine(run, env={"PATH": str(tmp_path / "bin"), "CXX": ""})
    assert status == 0  # kernels are an acceleration
    assert (found["c++ compiler"]["status"], found["ninja"]["status"]) == ("warning", "warning")
    assert "install one" in found["c++ compiler"]["remedy"] and "pip install ninja" in found["ninja"]["remedy"]


def test_a_compiler_that_does_not_compile(run: Runner, tmp_path: Path) -> None:
    fake = tmp_path / "g++"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo fake 1.0 && exit 0\nexit 1\n')
    fake.chmod(0o755)
    _, found = examine(run, env={"CXX": str(fake)})
    assert found["c++ compiler"]["status"] == "warning" and "cannot compile" in found["c++ compiler"]["found"]


@pytest.mark.parametrize(
    ("text", "status", "says", "remedy"),
    [
        ("distributed_type: [", "problem", "cannot read it", "accelerate config"),
        ("- a\n- b", "problem", "cannot read it", "accelerate config"),
        ("num_processes: 2", "problem", "distributed_type", "accelerate config"),
        ("distributed_type: MULTI_GPU\nnum_processes: 2\nnum_process: 3", "problem", "num_process", ""),
        ("distributed_type: MULTI_GPU\nnum_processes: two", "problem", "cannot read it", ""),
        ("distributed_type: 'NO'\nnum_processes: 2\nuse_cpu: true", "problem", "starts ONE process", "cpu-2.yaml"),
        ("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true", "problem", "starts ONE process", "cpu-2.yaml"),
        ("distributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: true", "warning", "alone", "ACCELERATE_USE_CPU=true"),
        ("distributed_type: MEGATRON_LM\nnum_processes: 2", "problem", "distributed_type MEGATRON_LM", "ddp"),
        ("distributed_type: FSDP\nnum_processes: 2", "problem", "fsdp_version 1", "fsdp_version: 2"),
        (f"{ZERO}\ndeepspeed_config: {{zero_stage: 3}}", "problem", "zero_stage 3", "fsdp2"),
        ("distributed_type: 'NO'\nmixed_precision: fp8", "problem", "'fp8'", "bf16"),
        ("distributed_type: 'NO'\ndynamo_config: {dynamo_backend: INDUCTOR}", "warning", "no effect", "remove"),
        ("distributed_type: MULTI_GPU\nnum_processes: 4\nnum_machines: 2", "problem", "num_machines 2", "machine 0"),
        ("compute_environment: AMAZON_SAGEMAKER\ndistributed_type: 'NO'", "problem", "cannot read it", ""),
    ],
)
def test_accelerate_config(run: Runner, tmp_path: Path, text: str, status: str, says: str, remedy: str) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text(text)
    code, found = examine(run, "--accelerate-config", path)
    check = found["accelerate config"]
    assert (check["status"], code) == (status, int(status == "problem")), check
    assert says in check["found"] and remedy in check["remedy"], check


def test_accelerate_config_that_is_right(run: Runner, tmp_path: Path) -> None:
    cpu = {"ACCELERATE_USE_CPU": "true"}
    code, found = examine(run, "--accelerate-config", ROOT / "launch/accelerate/cpu-2.yaml", env=cpu)
    assert code == 0 and "starts 2 processes on 1 machine, on CPUs" in found["accelerate config"]["found"]
    _, found = examine(run, "--accelerate-config", ROOT / "launch/accelerate/single.yaml")
    assert "starts 1 process on 1 machine" in found["accelerate config"]["found"]
    code, found = examine(run, "--accelerate-config", tmp_path / "absent.yaml")
    assert code == 1 and "there is no file" in found["accelerate config"]["found"]


def test_accelerate_config_with_a_port_in_use(run: Runner, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (tmp_path / "c.yaml").write_text(f"distributed_type: MULTI_GPU\nnum_processes: 2\nmain_process_port: {port}")
        code, found = examine(run, "--accelerate-config", tmp_path / "c.yaml", env={"ACCELERATE_USE_CPU": "true"})
    check = found["accelerate config"]
    assert code == 1 and f"main_process_port {port}: Address already in use" in check["found"], check
    assert "another main_process_port" in check["remedy"]


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-900])])
def test_damaged_shard(run: Runner, shards: Path, damage: Any) -> None:
    damage(shards / "shard-000001.tar")
    code, found = examine(run, "--data", shards)
    assert code == 1 and "shard-000001.tar" in found["data"]["found"]
    assert "data verify" in found["data"]["remedy"]


def test_damaged_sample(run: Runner, shards: Path) -> None:
    row = json.loads((shards / "shard-000002.index").read_text().splitlines()[-1])
    with open(shards / "shard-000002.tar", "r+b") as file:
        file.seek(row[1] + 30)
        file.write(b"xxxx")
    code, found = examine(run, "--data", shards)
    assert code == 1 and f"sample {row[0]!r} is damaged" in found["data"]["found"]
    code, found = examine(run, "--data", shards / "nowhere")
    assert code == 1 and "is no folder" in found["data"]["found"]


def test_stale_lock_of_a_killed_build(run: Runner, tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu/upfirdn2d/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    code, found = examine(run, env={"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert found["extension locks"]["status"] == "ok"  # a build may be going on
    os.utime(lock, (time.time() - 3600,) * 2)
    code, found = examine(run, env={"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert code == 1 and f"rm {lock}" in found["extension locks"]["remedy"]


@pytest.mark.parametrize(
    ("env", "name", "says"),
    [
        ({"GLOO_SOCKET_IFNAME": "absent7"}, "network", "names absent7"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "launch variables", "'fp8'"),
        ({"ACCELERATE_USE_FSDP": "1"}, "launch variables", "fsdp_version 1"),
        ({"OMP_NUM_THREADS": "many"}, "threads", "'many'"),
    ],
)
def test_variables(run: Runner, env: dict[str, str], name: str, says: str) -> None:
    code, found = examine(run, env=env)
    assert code == 1 and says in found[name]["found"] and found[name]["remedy"]


@pytest.mark.parametrize(
    ("gloo", "nccl", "says"),
    [
        ("", "", []),
        ("eth0,lo", "eth0", []),
        ("eth", "eth,ib", []),  # beginnings; NCCL is content with any of the list
        ("", "^docker0,lo", []),
        ("", "^docker,lo,veth", []),
        ("", "=eth0", []),
        ("", "^=eth", []),
        ("", "eth0:4000", []),
        ("eth0,ib0", "", ["GLOO_SOCKET_IFNAME names ib0, this machine has docker0, eth0, lo"]),
        ("^lo", "", ["GLOO_SOCKET_IFNAME names ^lo"]),  # gloo knows no exclusion
        ("", "ib0,=eth0", ["'ib0,=eth0', which leaves no network interface: this machine has docker0, eth0, lo"]),
        ("", "=eth", ["'=eth', which leaves no"]),
        ("ib", "^docker,eth,lo", ["GLOO_SOCKET_IFNAME names ib", "'^docker,eth,lo', which leaves no"]),
    ],
)
def test_network_interfaces(monkeypatch: pytest.MonkeyPatch, gloo: str, nccl: str, says: list[str]) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", gloo)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", nccl)
    found = devices.interfaces({"lo", "eth0", "docker0"})
    assert len(found) == len(says)
    for check, text in zip(found, says, strict=True):
        assert check.name == "network" and check.status == "problem" and text in check.found and check.remedy


def alone(*options: str, env: dict[str, str] | None = None, limit: str = "true") -> tuple[int, dict]:
    """In a process that imports everything itself."""
    command = f'{limit}; exec "$0" -m sivae_dist doctor --json "$@"'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, *options],
        env=environment(env),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=ROOT,
    )
    assert "Traceback" not in done.stderr + done.stdout, done
    return done.returncode, checks(Done(done.returncode, done.stdout, done.stderr))


def test_few_open_files_and_blocked_packages(tmp_path: Path) -> None:
    """No torch, no tyro, no numpy: it still looks at all the rest."""
    for name in ("torch", "tyro", "numpy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('{name} was not built for this machine')")
    code, found = alone(
        env={"PYTHONPATH": os.pathsep.join([str(tmp_path), STAND_IN, str(ROOT)])}, limit="ulimit -n 100"
    )
    assert code == 1
    for name in ("torch", "tyro", "numpy"):
        assert f"{name} was not built for this machine" in found[name]["found"]
        assert f"pip install {name}" in found[name]["remedy"]
    assert found["python"]["status"] == found["tqdm"]["status"] == "ok"
    assert found["gpu"]["status"] == "problem"  # cannot be told without torch
    assert found["open files"]["status"] == "problem" and "ulimit -n" in found["open files"]["remedy"]


def test_other_commands_tell_of_a_missing_package(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("raise ImportError('no yaml here')")
    done = subprocess.run(
        [sys.executable, "-m", "sivae_dist", "train"],
        env=environment({"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "a package is missing or broken: no yaml here" in done.stderr and "doctor" in done.stderr


def test_small_and_unwritable_disks(tmp_path: Path) -> None:
    prefix = small_disk.way()
    if prefix is None:
        pytest.skip("mounting a tmpfs is not allowed here, not even in a user namespace")
    (tmp_path / "disk").mkdir()
    run = Runner(tmp_path, prefix)
    try:
        assert run(shell=f"mount -t tmpfs -o size=2m tmpfs {tmp_path}/disk").status == 0
        code, found = examine(run, "--out", tmp_path / "disk/runs")
        assert code == 1 and "0.0 GB free" in found["out folder"]["found"]
        assert run(shell=f"mount -o remount,ro {tmp_path}/disk").status == 0
        code, found = examine(run, "--out", tmp_path / "disk/runs")
        assert code == 1 and "Read-only file system" in found["out folder"]["found"]
    finally:
        run.close()


def test_a_run(run: Runner, packed: Path, tmp_path: Path) -> None:
    """Settings, memory, and the data that the configuration names, unless others are named."""
    good, bad = (write_config(tmp_path / f"{name}.yaml", packed) for name in ("good", "bad"))
    bad.write_text("model: {name: residual}\ntrain: {bach: 3}\n")
    _, found = examine(run, "--config", good)
    assert {found[name]["status"] for name in ("config", "run's memory", "data")} == {"ok"}
    assert "48 samples of 16 px" in found["data"]["found"]
    assert "GiB of " in found["run's memory"]["found"]
    _, found = examine(run, "--config", good, "--data", tmp_path / "elsewhere")
    assert "elsewhere" in found["data"]["found"]
    status, found = examine(run, "--config", bad)
    assert status == 1
    assert "train.bach" in found["config"]["found"] and "batch" in found["config"]["remedy"]
    assert "data" not in found


def test_memory_of_a_run(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes of a machine without GPUs share its memory; what is needed is what `sivae-dist memory` tells."""
    from sivae_dist.apps import memory_table
    from sivae_dist.apps.checks import run_config

    path = write_config(tmp_path / "c.yaml", packed)
    impatient = tmp_path / "impatient.yaml"
    impatient.write_text(path.read_text() + "distributed: {timeout_s: 20}\n")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (row,) = memory_table.rows(path, memory_table.Wish(processes=3))
    monkeypatch.setattr(memory_table, "rows", lambda _, wish: [row] if wish.processes == 3 else [])
    for share, status in ((0.5, "problem"), (1.05, "warning"), (4.0, "ok")):
        monkeypatch.setattr(run_config, "available_memory", lambda share=share: share * 3 * row.bytes.total)
        (check,) = (c for c in run_config.config(path, 3) if c.name == run_config.MEMORY)
        assert check.status == status
        assert check.found.startswith("3 processes with ")
        assert ("accumulation" in check.remedy) == (status != "ok")
    for processes, status in ((1, "ok"), (3, "problem")):
        first = run_config.config(impatient, processes)[0]
        assert first.status == status
        assert ("with 3 ranks the first must be less" in first.found) == (status == "problem")

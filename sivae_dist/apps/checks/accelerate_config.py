"""What `accelerate launch` would start with a config file, and the ways in which that goes wrong without a word."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from sivae_dist.apps.checks.base import Check, ok, problem, warning
from sivae_dist.devices import cpu_asked
from sivae_dist.distributed import asked
from sivae_dist.errors import UserError

NAME = "accelerate config"
_SEVERAL = {"MULTI_GPU", "FSDP", "DEEPSPEED", "MULTI_NPU", "MULTI_MLU", "MULTI_XPU", "MULTI_HPU"}


def environment() -> list[Check]:
    """Variables of launchers in this shell, which every run started from it would obey."""
    found = []
    if precision := os.environ.get("ACCELERATE_MIXED_PRECISION"):
        found += _precision(precision, "ACCELERATE_MIXED_PRECISION")
    left = [n for n in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n in os.environ]
    if left:
        what = f"{', '.join(f'{n}={os.environ[n]}' for n in left)} set outside of a launcher"
        found.append(warning("launch variables", what, f"unset {' '.join(left)}, unless a launcher set them"))
    try:
        asked.settings()
    except UserError as error:
        found.append(problem("launch variables", error.what, error.fix))
    return found or [ok("launch variables", "none set in this shell")]


def config(path: Path | None) -> list[Check]:
    """The given file, or the user's default one."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file  # noqa: PLC0415

    if path is None:
        if not Path(default_config_file).is_file():
            what = "no default file: `accelerate launch` without --config_file starts one process a GPU, or one in all"
            return [ok(NAME, what)]
        path = Path(default_config_file)
    if not path.is_file():
        return [problem(NAME, f"there is no file {path}", "see launch/accelerate/ for files to start from")]
    try:
        settings = load_config_from_file(str(path))
        if not hasattr(settings, "num_processes"):
            raise ValueError(f"compute_environment {settings.compute_environment} is not this machine")
        values = {name: _plain(value) for name, value in vars(settings).items()}
        for name in ("num_processes", "num_machines", "machine_rank", "main_process_port"):
            if values.get(name) is not None:
                values[name] = int(values[name])
    except Exception as error:  # whatever it chokes on: YAML, a type, a missing or unknown key
        text = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = "correct it, run `accelerate config`, or start from a file of launch/accelerate/"
        return [problem(NAME, f"{path}: accelerate cannot read it: {text}", remedy)]
    checks = [*_kind(values), *_machines(values), *_ignored(values)]
    if values.get("mixed_precision") is not None:
        checks += _precision(str(values["mixed_precision"]), "mixed_precision")
    return checks if any(c.status != "ok" for c in checks) else [ok(NAME, f"{path} starts {_started(values)}")]


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _devices() -> int:
    import torch  # noqa: PLC0415

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _on_cpu(values: dict[str, Any]) -> bool:
    return bool(values.get("use_cpu")) or _devices() == 0


def _started(values: dict[str, Any]) -> str:
    several = values["distributed_type"] in _SEVERAL
    count, machines = (values["num_processes"], values.get("num_machines") or 1) if several else (1, 1)
    where = "CPUs" if _on_cpu(values) else "GPUs"
    return f"{count} process{'es' if count > 1 else ''} on {machines} machine{'s' if machines > 1 else ''}, on {where}"


def _kind(values: dict[str, Any]) -> list[Check]:
    """The number of processes that really start, on what."""
    kind, count = values["distributed_type"], values.get("num_processes") or 1
    cpu_launch = "launch with launch/accelerate/cpu-2.yaml as its first lines say"
    if kind in {"MEGATRON_LM", "XLA", "TPU"}:
        what = f"distributed_type {kind}; runs here train with ddp, fsdp2 or deepspeed"
        return [problem(NAME, what, "use launch/accelerate/ddp-multinode.yaml, or distributed_type MULTI_GPU or 'NO'")]
    if kind == "FSDP" and (version := int((values.get("fsdp_config") or {}).get("fsdp_version", 1))) != 2:
        return [problem(NAME, f"distributed_type FSDP with fsdp_version {version}", "set fsdp_config: fsdp_version: 2")]
    stage = (values.get("deepspeed_config") or {}).get("zero_stage", 2)
    if kind == "DEEPSPEED" and stage not in (1, 2):
        return [problem(NAME, f"distributed_type DEEPSPEED with zero_stage {stage}", "set it to 1 or 2, or use fsdp2")]
    if kind not in _SEVERAL and count > 1:
        what = f"distributed_type {kind} with num_processes {count} starts ONE process, without a word"
        return [problem(NAME, what, f"on GPUs set distributed_type MULTI_GPU; on CPUs {cpu_launch}")]
    if kind not in _SEVERAL:
        return []
    if count == -1:
        return [problem(NAME, "num_processes is missing", "set it to the number of processes of all machines together")]
    if count < 2:
        return [problem(NAME, f"distributed_type {kind} with num_processes {count}", "set distributed_type 'NO'")]
    here = count // max(1, values.get("num_machines") or 1)
    told_cpu = cpu_asked()
    if _on_cpu(values) and not told_cpu:
        what = f"{count} processes on CPUs, but ACCELERATE_USE_CPU is not set: each would train alone"
        return [warning(NAME, what, f"export ACCELERATE_USE_CPU=true for the launch ({cpu_launch})")]
    if not _on_cpu(values) and here > _devices():
        what = f"{here} processes on this machine, which has {_devices()} GPUs"
        return [problem(NAME, what, "set num_processes to the GPUs of all machines together")]
    return []


def _machines(values: dict[str, Any]) -> list[Check]:
    """Machines that must find each other, and the port on this one."""
    if values["distributed_type"] not in _SEVERAL:
        return []
    found = []
    machines, rank = values.get("num_machines") or 1, values.get("machine_rank") or 0
    address, port = values.get("main_process_ip"), values.get("main_process_port")
    if machines > 1:
        if not address or not port:
            what = f"num_machines {machines}, main_process_ip {address}, main_process_port {port}"
            found.append(problem(NAME, what, "give the address of machine 0 and a port that is free there"))
        elif str(address) in {"127.0.0.1", "localhost", "::1"}:
            what = f"num_machines {machines} with main_process_ip {address}, which is every machine's own"
            found.append(warning(NAME, what, "give machine 0's address, here or with --main_process_ip"))
        if not 0 <= rank < machines:
            found.append(problem(NAME, f"machine_rank {rank} of {machines}", "number the machines from 0"))
        if values["num_processes"] % machines:
            what = f"num_processes {values['num_processes']} on {machines} machines: some would get fewer"
            found.append(problem(NAME, what, "num_processes counts the processes of all machines together"))
    if port and rank == 0 and (holder := _port_problem(int(port))):
        remedy = "choose another main_process_port on all machines (0: any free one, on one machine)"
        found.append(problem(NAME, f"main_process_port {port}: {holder}", remedy))
    return found


def _port_problem(port: int) -> str:
    if not 0 < port < 1 << 16:
        return "expected 1 to 65535"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return str(error.strerror)
    return ""


def _precision(value: str, where: str) -> list[Check]:
    """The launcher's precision against what training supports."""
    from sivae_dist.engine.precision import PrecisionConfig  # noqa: PLC0415
    from sivae_dist.errors import UserError  # noqa: PLC0415

    before = os.environ.get("ACCELERATE_MIXED_PRECISION")
    os.environ["ACCELERATE_MIXED_PRECISION"] = value
    try:
        PrecisionConfig().resolved()
    except UserError as error:
        return [problem(NAME if where == "mixed_precision" else "launch variables", error.what, error.fix)]
    finally:
        os.environ.pop("ACCELERATE_MIXED_PRECISION")
        if before is not None:
            os.environ["ACCELERATE_MIXED_PRECISION"] = before
    return []


def _ignored(values: dict[str, Any]) -> list[Check]:
    """Settings that sivae-dist does not take from the launcher."""
    if values.get("dynamo_config"):
        return [warning(NAME, "dynamo_config has no effect: networks are not compiled", "remove it")]
    return []

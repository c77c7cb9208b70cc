"""How this process came to be: under `accelerate launch`, torchrun or alone; on which device; with how many others."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from sivae_dist.devices import cuda_used
from sivae_dist.distributed import asked, failure
from sivae_dist.distributed.config import DistributedConfig
from sivae_dist.distributed.group import Group
from sivae_dist.errors import UserError


@dataclass
class Launch:
    """The running process group. `finish` must be called before the process ends well."""

    group: Group
    device: torch.device
    accelerator: Any  # accelerate.Accelerator, or None when accelerate is not installed and there is one process

    def describe(self) -> dict[str, object]:
        """Facts for the run's manifest."""
        kind = str(self.accelerator.distributed_type) if self.accelerator is not None else "DistributedType.NO"
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "ranks": self.group.ranks,
            "device": name,
            "kind": kind.removeprefix("DistributedType."),
            "threads": torch.get_num_threads(),
        }

    def finish(self) -> None:
        """Waits for all ranks, then leaves the group: leaving without the barrier aborts some processes at exit."""
        if self.group.ranks > 1:
            self.accelerator.wait_for_everyone()
        failure.unwatch()
        if self.accelerator is not None:
            self.accelerator.end_training()


def start(config: DistributedConfig) -> Launch:
    """Joins the processes that were launched together.

    Raises UserError when accelerate is needed but missing, asks for a strategy that is not there, or the number of
    ranks is not the one asked for (`accelerate launch --cpu --num_processes 2` starts one process without a word).
    """
    world = _world()
    asked.resolved(config)  # tells of what is not supported before anything starts
    cpu = not cuda_used()
    try:
        from accelerate import Accelerator  # noqa: PLC0415 (a run of one process does without it)
        from accelerate.utils import InitProcessGroupKwargs  # noqa: PLC0415
    except ImportError as error:
        if world > 1:
            raise UserError(f"{world} processes were launched, but accelerate cannot be imported: {error}",
                            "pip install accelerate") from error  # fmt: skip
        launch = Launch(Group(), torch.device("cpu" if cpu else "cuda"), None)
        _check_ranks(config, launch.group.ranks)
        return launch
    handlers = [InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout_s))]
    try:
        with asked.hidden():  # strategies are ours: accelerate starts the processes and the group
            accelerator = Accelerator(cpu=cpu, kwargs_handlers=handlers, mixed_precision="no")
    except Exception as error:  # settings of the launcher reach it unchecked, through ACCELERATE_* variables
        raise _not_started(error, world) from error
    failure.watch()
    group = Group(accelerator.process_index, accelerator.num_processes, config.timeout_s)
    _check_ranks(config, group.ranks)
    if group.ranks != world:
        raise UserError(f"the launcher announced {world} processes, but {group.ranks} joined", "see `accelerate env`")
    return Launch(group, accelerator.device, accelerator)


def _world() -> int:
    """The number of processes the launcher announces. Raises UserError for variables that make no group."""
    numbers = {}
    for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        if not text.isdecimal():
            raise UserError(
                f"the environment variable {name} is {text!r}, expected a whole number",
                "it is set by the launcher: start with `accelerate launch`, or unset it for one process",
            )
        numbers[name] = int(text)
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise UserError(
            f"RANK is {numbers['RANK']} and WORLD_SIZE {numbers['WORLD_SIZE']}, expected ranks below the world's size",
            "both are set by the launcher: start with `accelerate launch`, or unset them for one process",
        )
    return numbers["WORLD_SIZE"]


def _not_started(error: Exception, world: int) -> UserError:
    text = " ".join(str(error).split())[:400] or type(error).__name__
    if world > 1:
        address = f"{os.environ.get('MASTER_ADDR', '(unset)')}:{os.environ.get('MASTER_PORT', '(unset)')}"
        fix = "check that every machine names the same main_process_ip and a port that is free there and open to others"
        return UserError(f"{world} processes could not meet at MASTER_ADDR:MASTER_PORT = {address}: {text}", fix)
    given = sorted(name for name in os.environ if name.startswith("ACCELERATE_"))
    return UserError(
        f"accelerate could not start: {text}",
        f"correct the accelerate config or these variables: {', '.join(given) or '(none is set)'}; "
        "`sivae-dist doctor --accelerate-config FILE` looks at a config",
    )


def _check_ranks(config: DistributedConfig, ranks: int) -> None:
    if config.ranks is not None and ranks != config.ranks:
        raise UserError(
            f"distributed.ranks is {config.ranks}, but {ranks} process{'es' if ranks > 1 else ''} started",
            "`accelerate launch --cpu --num_processes N` starts one process only; on CPUs launch with "
            "launch/accelerate/cpu-2.yaml, elsewhere check num_processes and num_machines",
        )

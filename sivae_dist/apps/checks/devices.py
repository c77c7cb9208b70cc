"""GPUs, process groups, threads."""

from __future__ import annotations

import os
import shutil
import socket
from datetime import timedelta

from sivae_dist.apps.checks.base import Check, command_output, ok, problem, warning, within

_GROUP_S = 60.0


def gpus() -> list[Check]:
    """Torch's CUDA build against the machine's driver and devices; one small product on each device."""
    import torch  # noqa: PLC0415

    smi = command_output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    there = smi.strip().splitlines() if smi else []
    build = f"torch {torch.__version__}, CUDA build {torch.version.cuda or 'none'}"
    if not torch.cuda.is_available():
        if not there and not shutil.which("nvidia-smi"):
            return [ok("gpu", f"{build}; no NVIDIA driver: training runs on the CPU")]
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None and not hidden.strip():
            return [warning("gpu", f"{build}; CUDA_VISIBLE_DEVICES is empty: training runs on the CPU", "unset it")]
        remedy = (
            "update the driver, or install a torch built for it (pytorch.org, 'previous versions')"
            if torch.version.cuda
            else "install a CUDA build of torch (see pytorch.org)"
        )
        return [warning("gpu", f"{build} cannot use this machine's {'; '.join(there) or 'driver'}", remedy)]
    found = []
    built_for = torch.cuda.get_arch_list()
    driver = there[0].rpartition(",")[2].strip() if there else "?"
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        major, minor = torch.cuda.get_device_capability(number)
        gib = properties.total_memory / (1 << 30)
        what = f"{properties.name}, {gib:.0f} GiB, compute capability {major}.{minor}, driver {driver}; {build}"
        name = f"gpu {number}"
        try:
            value = torch.ones(8, 8, device=f"cuda:{number}")
            works = float((value @ value).sum()) == 512.0
        except RuntimeError as error:
            text = str(error).splitlines()[0][:200]
            remedy = (
                f"this torch is built for {', '.join(built_for)}: install one built for {major}.{minor}, or free it"
            )
            found.append(problem(name, f"{what}: {text}", remedy))
            continue
        wrong = problem(name, f"{what}: a product of ones is wrong", "the device or its memory is faulty: replace it")
        found.append(ok(name, what) if works else wrong)
    return found


def gpu_decode() -> list[Check]:
    """Whether `data.decode gpu` can be had: two small JPEGs are decoded with it."""
    import torch  # noqa: PLC0415

    from sivae_dist.data import device_decode  # noqa: PLC0415

    if not torch.cuda.is_available():
        return [ok("gpu decode", "no CUDA device: JPEGs are decoded on the CPU")]
    if missing := device_decode.unusable():
        return [ok("gpu decode", f"data.decode gpu cannot be used ({missing}): JPEGs are decoded on the CPU")]
    return [ok("gpu decode", "data.decode gpu can be used: nvJPEG decodes what Pillow does, but for rounding")]


def interfaces(names: set[str]) -> list[Check]:
    """What is wrong with the network interfaces that the environment names, on a machine with these.

    gloo wants one for each beginning of a name in the list. NCCL takes all that the list fits, or with a leading ^ all
    others; = (first, or after ^) means whole names instead of beginnings. Both signs stand before the whole list.
    """
    found, here = [], f"this machine has {', '.join(sorted(names))}"
    asked = os.environ.get("GLOO_SOCKET_IFNAME", "")
    wanted = [word.split(":")[0] for word in asked.split(",") if word]
    if absent := [word for word in wanted if not any(name.startswith(word) for name in names)]:
        what = f"GLOO_SOCKET_IFNAME names {', '.join(absent)}, {here}"
        found.append(problem("network", what, "set GLOO_SOCKET_IFNAME to one of them, or unset it"))
    asked = os.environ.get("NCCL_SOCKET_IFNAME", "")
    listed = asked.removeprefix("^").removeprefix("=")
    words = [word.split(":")[0] for word in listed.split(",") if word]
    whole, others = asked.removeprefix("^").startswith("="), asked.startswith("^")
    fitting = {n for n in names if any(n == word if whole else n.startswith(word) for word in words)}
    if words and not (names - fitting if others else fitting):
        what = f"NCCL_SOCKET_IFNAME is {asked!r:.200}, which leaves no network interface: {here}"
        remedy = "set NCCL_SOCKET_IFNAME to one of them (^ before the list means all but these), or unset it"
        found.append(problem("network", what, remedy))
    return found


def groups() -> list[Check]:
    """A real gloo group of one process, NCCL's presence, and network interfaces named in the environment."""
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415
    from torch.distributed import HashStore  # type: ignore[attr-defined]  # noqa: PLC0415

    found = interfaces({name for _, name in socket.if_nameindex()})
    remedy = "name the network interface (export GLOO_SOCKET_IFNAME=eth0), and see that `hostname` is in /etc/hosts"
    hung = problem("gloo", f"a group of one process did not start within {_GROUP_S:.0f} s", remedy)
    if not (dist.is_available() and dist.is_gloo_available()):
        return [*found, problem("gloo", "this torch has no gloo", "install a torch from pytorch.org")]

    def gloo() -> list[Check]:
        try:
            dist.init_process_group(
                "gloo", store=HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=_GROUP_S / 2)
            )
            value = torch.ones(4)
            dist.all_reduce(value)
            dist.destroy_process_group()
        except RuntimeError as error:
            return [problem("gloo", f"a group of one process fails: {' '.join(str(error).split())[:300]}", remedy)]
        return [ok("gloo", "a group of one process starts and sums")]

    found += within(_GROUP_S, gloo, "gloo", hung)
    if torch.cuda.is_available() and dist.is_nccl_available():
        version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        found.append(ok("nccl", version))
    elif torch.cuda.is_available():
        found.append(problem("nccl", "this torch has none, several GPUs cannot work together", "install another torch"))
    else:
        found.append(ok("nccl", "not needed without CUDA devices"))
    return found


def threads() -> list[Check]:
    """Cores this process may use against the number of threads asked for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS")
    if asked is None:
        return [ok("threads", f"{cores} usable cores; OMP_NUM_THREADS is unset (one process: torch uses all cores)")]
    if not asked.isdecimal() or not int(asked):
        return [problem("threads", f"OMP_NUM_THREADS is {asked!r}, expected a number", "unset or correct it")]
    if int(asked) > cores:
        what = f"OMP_NUM_THREADS is {asked}, more than the {cores} usable cores: threads would wait for each other"
        return [warning("threads", what, f"set it to {cores} divided by the processes of this machine, or less")]
    return [ok("threads", f"{cores} usable cores, OMP_NUM_THREADS={asked}")]

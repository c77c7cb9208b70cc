"""Which kind of device a process is meant to use."""

from __future__ import annotations

import os

TRUE = frozenset({"1", "true", "yes", "y", "t", "on"})  # what accelerate takes for yes


def cpu_asked() -> bool:
    """Whether the launcher wants CPUs, GPUs or not: accelerate reads the same variable."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in TRUE


def cuda_used() -> bool:
    """Whether training in this process goes to a CUDA device. If not, nothing of it may touch one: a context takes
    hundreds of MB there, and devices may be others' alone.
    """
    import torch  # noqa: PLC0415 (`doctor` asks what the launcher wants where torch may be missing)

    return not cpu_asked() and torch.cuda.is_available()

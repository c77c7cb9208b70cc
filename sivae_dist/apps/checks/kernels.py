"""The fused kernels: whether they are there for this machine, can be built, and what doing without them means."""

from __future__ import annotations

import os
from typing import Literal

from sivae_dist.apps.checks.base import Check, ok, warning
from sivae_dist.errors import UserError

# From `sivae-dist bench kernels --device cpu` on two cores (kernels/*/README.md); on GPUs not measured yet.
_COST = "several passes over memory instead of one (on a CPU they take 3 to 11 times as long)"


def kernels() -> list[Check]:
    """One line for each kind of device that this torch can use."""
    import torch  # noqa: PLC0415

    from sivae_dist.ops.kernels import mode  # noqa: PLC0415

    try:
        chosen = mode()
    except UserError as error:
        return [warning("kernels", error.what, error.fix)]
    said = " (SIVAE_KERNELS)" if os.environ.get("SIVAE_KERNELS") else ""
    found = [_of("cpu", chosen, said)]
    if torch.cuda.is_available():
        found.append(_of("cuda", chosen, said))
    else:
        found.append(ok("kernels, cuda", "torch sees no CUDA device that could use them"))
    return found


def _of(device: Literal["cpu", "cuda"], chosen: str, said: str) -> Check:
    from sivae_dist.ops import _ahead, _build  # noqa: PLC0415
    from sivae_dist.ops._toolchain import UnavailableError, recipe  # noqa: PLC0415

    name = f"kernels, {device}"
    used = chosen == device or (chosen == "auto" and device == "cuda")
    plain = "" if used else f"; with mode {chosen}{said} such tensors use plain PyTorch"
    if ahead := _ahead.find(device):
        return ok(name, f"built ahead of time: {ahead.library}{plain}")
    try:
        made = recipe(device)
    except UnavailableError as error:
        what = f"cannot be built: {error.why}. Plain PyTorch does their work: {_COST}"
        # Nobody misses the kernels of a device that would not use them.
        return warning(name, what, error.fix) if used else ok(name, f"cannot be built: {error.why}{plain}")
    if built := _build.find(made):
        return ok(name, f"built: {built.library}{plain}")
    return ok(name, f"will be built on first use, with {made.compiler[0]} into {_build.cache_folder()}{plain}")

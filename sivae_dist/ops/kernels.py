"""Which implementation an operator runs: the plain PyTorch reference, or the fused kernels of `kernels/`.

| mode      | tensors on a GPU                                              | tensors on a CPU      |
|-----------|---------------------------------------------------------------|-----------------------|
| auto      | CUDA kernels; the reference, with one line why, without them  | reference             |
| reference | reference                                                     | reference             |
| cpu       | reference                                                     | CPU kernels, or error |
| cuda      | CUDA kernels, or error                                        | reference             |

The mode is `kernels.mode` of a run's configuration; the variable SIVAE_KERNELS wins. Under `auto` tensors on a CPU
never use kernels, so the bits of a run do not depend on what a cache happens to hold. Nothing that is saved
depends on the mode.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sivae_dist.errors import UserError, nearest
from sivae_dist.ops import _ahead, _build, _cache
from sivae_dist.ops._toolchain import Device, UnavailableError

Mode = Literal["auto", "reference", "cpu", "cuda"]
Dense = Literal["torch", "onednn"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelConfig:
    """Which implementation the operators run."""

    mode: Mode = "auto"
    """auto: fused CUDA kernels on a GPU if they can be had, else plain PyTorch. reference: plain PyTorch. cpu, cuda:
    the fused kernels of that device, or an error. The environment variable SIVAE_KERNELS wins."""
    dense: Dense = "torch"
    """How perceptrons multiply float32 matrices on a CPU. torch: as torch chooses. onednn: by oneDNN, which is twice as
    fast on some processors; another device or format, a torch without it, and mode reference do as torch chooses.
    `sivae-dist bench toy` compares them."""


class _Choice:
    """The mode in force: what `configure` was told, unless the environment says otherwise."""

    mode: Mode = "auto"
    dense: Dense = "torch"


def dense() -> Dense:
    """How perceptrons multiply on a CPU: as `configure` was told; torch without oneDNN, or in reference mode."""
    if mode() == "reference" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "torch"
    return _Choice.dense


def mode() -> Mode:
    """The mode in force. Raises UserError when SIVAE_KERNELS names none."""
    given = os.environ.get("SIVAE_KERNELS")
    if not given:
        return _Choice.mode
    for known in get_args(Mode):
        if given == known:
            return known  # type: ignore[no-any-return]
    raise UserError(f"SIVAE_KERNELS is {given!r}", nearest(given, get_args(Mode)))


def configure(config: KernelConfig, device: torch.device, *, used: bool = True) -> dict[str, object]:
    """Takes a run's mode and makes the kernels ready for its device now rather than in the first iteration.

    used: whether the run's networks have operators with kernels; auto builds none for a run that would not call them.
    Returns what the run's manifest should say. Raises UserError when an explicit mode cannot be had, also because the
    run is on another device.
    """
    _Choice.mode, _Choice.dense = config.mode, config.dense
    _serves.cache_clear()
    chosen = mode()
    if chosen in {"cpu", "cuda"} and device.type != chosen:
        raise UserError(
            f"kernels.mode is {chosen}, but the run is on {device.type}",
            "set kernels.mode (or SIVAE_KERNELS) to auto or reference"
            + ("" if device.type == "cpu" else ", or launch on a CPU"),
        )
    if chosen == "auto" and not used:
        return {"mode": chosen, "running": "none needed"}
    if not serves(device.type):
        return {"mode": chosen, "running": "reference"}
    loaded = load("cuda" if device.type == "cuda" else "cpu")
    return {"mode": chosen, "running": device.type, "build": loaded.key, "made_of": loaded.facts}


@contextlib.contextmanager
def using(wanted: Mode) -> Iterator[None]:
    """Within, this mode (unless SIVAE_KERNELS is set). Not seen by graphs that torch.compile has already made."""
    before = _Choice.mode
    _Choice.mode = wanted
    _serves.cache_clear()
    try:
        yield
    finally:
        _Choice.mode = before
        _serves.cache_clear()


def selected(x: Tensor) -> bool:
    """Whether the kernels serve this tensor. Raises UserError when they must and cannot be had."""
    return x.dtype in DTYPES and serves(x.device.type)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def serves(device_type: str) -> bool:
    """Whether tensors on this kind of device use kernels; builds and loads them if so.

    The answer is a constant of a compiled graph. Raises UserError when they must be used and cannot be had.
    """
    return _serves(device_type)


@functools.cache
def _serves(device_type: str) -> bool:
    chosen = mode()
    if device_type == "cpu" and chosen == "cpu":
        device: Device = "cpu"
    elif device_type == "cuda" and chosen in {"auto", "cuda"}:
        device = "cuda"
    else:
        return False
    try:
        load(device)
    except UnavailableError as error:
        if chosen == "auto":
            log.warning("the operators run on plain PyTorch: %s (%s)", error.why, error.fix)
            return False
        raise UserError(f"kernels.mode is {chosen}, but {error.why}", error.fix) from error
    return True


@functools.cache
def _outcome(device: Device) -> _build.Built | UnavailableError:
    """Builds or finds, and loads, once a process; a failure is remembered, too."""
    try:
        built = _ahead.find(device) or _held(device)
        torch.ops.load_library(built.library)  # type: ignore[no-untyped-call]
    except UnavailableError as error:
        return error
    except OSError as error:  # the dynamic linker
        text = " ".join(str(error).split())[:300]
        fix = f"remove {_build.cache_folder()} and try again"
        return UnavailableError(f"the {device} kernels cannot be loaded: {text}", fix)
    log.info("using the %s kernels %s (%s)", device, built.key, built.library)
    return built


def _held(device: Device) -> _build.Built:
    """The build in the cache, safe from being removed as an old one while this process lives."""
    for _ in range(3):  # it may be removed between being found and being held
        if _cache.hold((built := _build.ensure(device)).library):
            return built
    raise UnavailableError(
        f"{built.library} disappears as soon as it is built", "set SIVAE_KERNEL_CACHE to another folder"
    )


def load(device: Device) -> _build.Built:
    """The kernels for a device, loaded into this process. Raises UnavailableError when they cannot be had."""
    outcome = _outcome(device)
    if isinstance(outcome, UnavailableError):
        raise outcome
    return outcome

"""What all ranks of a run must have in common, and when it is asked; the asking is `distributed.consistency`."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sivae_dist import resources
from sivae_dist.distributed.consistency import agree, agree_on_tensors
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.strategy import Strategy
from sivae_dist.engine.config import RunConfig, to_dict
from sivae_dist.engine.logs import log
from sivae_dist.engine.run_folder import PACKAGES
from sivae_dist.errors import UserError
from sivae_dist.models import Autoencoder

# Settings that each rank may have for itself: where its copy of the data lies, and how it reads them.
_READING = (
    "workers",
    "prefetch",
    "timeout_s",
    "cache_dir",
    "cache_gb",
    "retries",
    "connect_timeout_s",
    "read_timeout_s",
)
OWN = ("data.url", *(f"data.{name}" for name in _READING))
_SOURCES = (".py", ".h", ".cpp", ".cu")
_START = (
    "start every rank from the same checkout and environment (constraints.txt pins it) with the same command; "
    "--distributed.check off trains all the same"
)
_STATE = (
    "let all ranks read the same data and the same run folder (on storage that all machines share); "
    "--distributed.check off trains all the same"
)
_LATER = (
    "the same command goes on from the last checkpoint, where all were alike; if this comes again, look for a faulty "
    "device or an operation that is not deterministic; --distributed.check start asks no more"
)


def check_start(group: Group, config: RunConfig, device: torch.device) -> None:
    """Code, settings, libraries and kind of device: asked before anything is built. Collective; raises UserError."""
    check_patience(group.ranks, config)
    if group.ranks == 1 or config.distributed.check == "off":
        return
    facts = versions() | {"device": device.type}
    facts |= {f"the setting {key}": str(value) for key, value in flat(to_dict(config)).items() if key not in OWN}
    agree(group, facts | sources(), _START)


def check_patience(ranks: int, config: RunConfig) -> None:
    """A rank must give up its data before the others give up waiting for it. Raises UserError."""
    data: float | None = getattr(config.data, "timeout_s", None)  # data that are computed need no patience
    others = config.distributed.timeout_s
    if ranks > 1 and data is not None and data >= others:
        raise UserError(
            f"data.timeout_s is {data:g} and distributed.timeout_s {others:g}: with {ranks} ranks the first must "
            "be less, or those that wait for one without data end before it can tell why, and nothing is saved",
            f"--distributed.timeout_s {2 * data:g}, or a smaller data.timeout_s",
        )


def check_state(group: Group, config: RunConfig, facts: dict[str, str], tensors: dict[str, dict[str, Tensor]]) -> None:
    """Where training begins, and that all weights are the same: asked before the first step. As `check_start`."""
    if config.distributed.check != "off":
        agree(group, facts, _STATE)
        agree_on_tensors(group, tensors, _STATE)


def check_weights(group: Group, config: RunConfig, nimg: int, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Asked at each checkpoint, before it is written. Collective; raises UserError."""
    if group.ranks > 1 and config.distributed.check == "checkpoints":
        began = time.monotonic()
        try:
            agree_on_tensors(group, tensors, _LATER)
        except UserError as error:
            raise UserError(f"after {nimg} images {error.what}", error.fix) from error
        log.info("the weights of all ranks compared in %.3f s", time.monotonic() - began)


def state_tensors(model: Autoencoder, ema: torch.nn.Module, strategy: Strategy) -> dict[str, dict[str, Tensor]]:
    """The tensors of a training state by what they are, as this rank holds them."""
    players = {"encoder": model.encoder, "decoder": model.decoder}
    groups = {f"weights of the {name}": player.state_dict() for name, player in players.items()}
    groups["averaged weights"] = ema.state_dict()
    for name in strategy.optimizers:
        groups[f"optimizer of the {name}"] = optimizer_tensors(strategy, name)
    return groups


def optimizer_tensors(strategy: Strategy, player: str) -> dict[str, Tensor]:
    """PARAMETER/STATE -> tensor. Collective."""
    states = strategy.optimizer_state(player)
    return {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}


def versions() -> dict[str, str]:
    """Python and what the numbers of a run come from, by name. Missing packages are left out."""
    found = {"python": platform.python_version(), "processor": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with the build, as in 2.13.0+cpu
    if torch.version.cuda:
        found |= {"CUDA": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
    return found


@functools.cache
def sources() -> dict[str, str]:
    """Name -> hash (12 hexadecimal digits) of every file of this package's code and of its kernels."""
    package = Path(__file__).resolve().parents[1]
    roots = [(package, package.name)]
    with contextlib.suppress(UserError):  # an installation without them
        roots.append((resources.kernels_dir(), "kernels"))
    found: dict[str, str] = {}
    for root, name in roots:
        for path in sorted(root.rglob("*")):
            if path.suffix in _SOURCES and path.is_file():
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                found[f"{name}/{path.relative_to(root).as_posix()}"] = content[:12]
    return found


def code_hash() -> str:
    """One hash of `sources`."""
    return hashlib.sha256("\n".join(f"{k} {v}" for k, v in sorted(sources().items())).encode()).hexdigest()[:16]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found

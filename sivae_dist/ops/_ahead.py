"""Kernels built ahead of time: `SIVAE_BUILD_KERNELS=1 pip install --no-build-isolation .` makes `sivae_dist._C`.

It holds the CUDA kernels where nvcc and a torch with CUDA are there, else the CPU kernels for any processor of this
kind. A record of what it was made from lies beside it; a library that does not fit the sources, the torch or the
visible devices of this environment is left alone, and the kernels are built where they run instead.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import torch

from sivae_dist.errors import UserError
from sivae_dist.ops._build import Built, build
from sivae_dist.ops._toolchain import Device, UnavailableError, digest, recipe, why_unserved
from sivae_dist.resources import kernels_dir

PACKAGE = Path(__file__).resolve().parents[1]
NAME = "_C.abi3.so"
RECORD = "_C.json"

log = logging.getLogger(__name__)


def make(target: Path, scratch: Path) -> Device:
    """Builds into the package folder `target` (called by setup.py). Raises UnavailableError if nothing can be built."""
    device: Device = "cuda" if torch.version.cuda is not None else "cpu"
    try:
        made = recipe(device, ahead=True)
    except UnavailableError:
        if device == "cpu":
            raise
        device = "cpu"  # no nvcc
        made = recipe(device, ahead=True)
    scratch.mkdir(parents=True, exist_ok=True)
    built = build(made, scratch / f"{device}-{made.key}")
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy2(built.library, target / NAME)
    record = {"device": device, "key": built.key, "facts": built.facts}
    (target / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return device


def find(device: Device) -> Built | None:
    """The library built ahead of time if there is one that serves the device here."""
    path = PACKAGE / NAME
    if not path.is_file():
        return None
    try:
        record = json.loads((PACKAGE / RECORD).read_text())
        facts = {str(k): str(v) for k, v in record["facts"].items()}
        if record["device"] != device:
            return None
        key, why = str(record["key"]), _misfit(device, facts)
    except (OSError, ValueError, KeyError, AttributeError, UserError) as error:
        key, facts, why = "", {}, f"its record cannot be read ({error})"
    if why:
        log.info("%s is not used: %s", path, why)
        return None
    return Built(path, key, facts)


def _misfit(device: Device, facts: dict[str, str]) -> str:
    """Why a library with these facts cannot serve here, or ""."""
    if facts["sources"] != digest(kernels_dir()):
        return "the sources have changed since it was built"
    for name, here in (("torch", torch.__version__), ("cuda", str(torch.version.cuda))):
        if facts[name] != here:
            return f"it was built for {name} {facts[name]}, this is {here}"
    return why_unserved(facts["flags"]) if device == "cuda" else ""

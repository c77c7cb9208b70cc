"""Kernels built ahead of time: `SIVAE_BUILD_KERNELS=1 pip install --no-build-isolation .` makes `sivae_dist._C`.

The library lies in the package, with a record of what it was made from beside it; one that does not fit the sources or
the torch of this environment is left alone, and the kernels are built where they run instead.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

from sivae_dist.errors import UserError
from sivae_dist.ops._build import Built
from sivae_dist.ops._toolchain import Device, digest
from sivae_dist.resources import kernels_dir

PACKAGE = Path(__file__).resolve().parents[1]
NAME = "_C.abi3.so"
RECORD = "_C.json"

log = logging.getLogger(__name__)


def find(device: Device) -> Built | None:
    """The library built ahead of time if there is one that serves the device here."""
    path = PACKAGE / NAME
    if not path.is_file():
        return None
    try:
        record = json.loads((PACKAGE / RECORD).read_text())
        facts = {str(k): str(v) for k, v in record["facts"].items()}
        why = _misfit(facts) if device in record["devices"] else f"it has no kernels for {device}"
    except (OSError, ValueError, KeyError, AttributeError, UserError) as error:
        why = f"its record cannot be read ({error})"
        facts = {}
    if why:
        log.info("%s is not used: %s", path, why)
        return None
    return Built(path, str(record["key"]), facts)


def _misfit(facts: dict[str, str]) -> str:
    """Why a library with these facts cannot serve here, or ""."""
    if facts["sources"] != digest(kernels_dir()):
        return "the sources have changed since it was built"
    for name, here in (("torch", torch.__version__), ("cuda", str(torch.version.cuda))):
        if facts[name] != here:
            return f"it was built for {name} {facts[name]}, this is {here}"
    return ""

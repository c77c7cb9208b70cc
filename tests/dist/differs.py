"""`sivae-dist train`, except that rank 1 is not like the others: DIFFERS names how (several, separated by commas)."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from typing import Any

import torch

from sivae_dist.cli.train import main
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.engine import agreement

arguments = sys.argv[1:]
ways = [way for way in os.environ["DIFFERS"].split(",") if way and os.environ["RANK"] == "1"]
version, sources, broadcast = metadata.version, agreement.sources, Replicated.__init__
steps = 0


def another_version(name: str) -> str:
    return "1.2.3" if name == "numpy" else version(name)


def other_sources() -> dict[str, str]:
    return sources() | {"sivae_dist/engine/ema.py": "0123456789ab"}


def unsynchronised(self: Replicated, players: dict[str, torch.nn.Module], *rest: Any, **options: Any) -> None:
    broadcast(self, players, *rest, **options)
    with torch.no_grad():
        next(players["decoder"].parameters()).view(-1)[3] += 1e-6


step = Replicated.step


def drifting(self: Replicated, name: str) -> None:
    """A fault in the third step of the encoder, as of a device that computes wrongly."""
    global steps  # noqa: PLW0603
    step(self, name)
    steps += name == "encoder"
    if steps == 3 and name == "encoder":
        with torch.no_grad():
            next(self.players[name].parameters()).view(-1)[0] += 1e-6


for way in ways:
    if way == "version":
        metadata.version = another_version
    elif way == "code":
        agreement.sources = other_sources
    elif way == "weights":
        Replicated.__init__ = unsynchronised
    elif way == "drift":
        Replicated.step = drifting
    else:  # an option and its value, or a variable
        name, _, value = way.partition("=")
        if name.startswith("--"):
            arguments += [name, value]
        else:
            os.environ[name] = value
main(arguments)

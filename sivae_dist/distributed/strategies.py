"""Which strategy a run trains with. One file a strategy; a new one is one more line here."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from sivae_dist.distributed import asked
from sivae_dist.distributed.config import DistributedConfig
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.strategy import Strategy

# Name in the configuration -> module and its function `build`, imported when chosen: some need optional libraries.
STRATEGIES = {
    "ddp": "sivae_dist.distributed.replicated",
    "fsdp2": "sivae_dist.distributed.fsdp2",
    "deepspeed": "sivae_dist.distributed.deepspeed",
}


def build(
    config: DistributedConfig,
    players: dict[str, nn.Module],
    optimizers: dict[str, Optimizer],
    group: Group,
    *,
    clip_norm: float | None = None,
) -> Strategy:
    """The strategy of a run, holding players (on their device, rank 0's weights) and optimizers. Collective."""
    config = asked.resolved(config)
    module = importlib.import_module(STRATEGIES[config.strategy])
    make: Callable[..., Strategy] = module.build
    return make(config, players, optimizers, group, clip_norm=clip_norm)

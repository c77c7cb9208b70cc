"""Trains tiny models in float64 on however many ranks it is started on, and stores gradients and weights.

Run by test_ranks_agree.py, under `accelerate launch` and in its own process; both must store the same numbers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import numpy as np
import torch

from sivae_dist import counters
from sivae_dist.data import Batch
from sivae_dist.distributed import launch
from sivae_dist.distributed.config import DistributedConfig
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.distributed.sync_batch_norm import synchronise_batch_norm
from sivae_dist.engine.iteration import Iteration
from sivae_dist.engine.optim import OptimConfig, PlayerOptim
from sivae_dist.models.blocks import recompute_blocks
from sivae_dist.models.modulated import ModulatedConfig
from sivae_dist.models.residual import ResidualConfig
from sivae_dist.models.style import StyleConfig
from sivae_dist.objectives.introvae import IntroVaeConfig
from sivae_dist.objectives.soft_introvae import SoftIntroVaeConfig
from sivae_dist.objectives.vae import VaeConfig

SIZE = 12
CASES = {
    # name: (objective, norm, accumulation, global batch). 7 and 1 do not divide by 2 or 3; 1 leaves ranks without data.
    "soft": (SoftIntroVaeConfig(beta_neg=4.0, gamma_r=0.5), "batch", 1, 7),
    "soft-accumulated": (SoftIntroVaeConfig(beta_neg=4.0, gamma_r=0.5), "batch", 3, 7),
    "introvae-accumulated": (IntroVaeConfig(margin=1.0, beta_rec=0.3), "batch", 3, 8),
    "style-accumulated": (SoftIntroVaeConfig(beta_neg=4.0, decoder_z="reencode", draws="fresh"), "style", 3, 7),
    "soft-one-image": (SoftIntroVaeConfig(beta_neg=4.0), "group", 1, 1),
    "soft-empty-micro-batches": (SoftIntroVaeConfig(beta_neg=4.0), "batch", 3, 1),
    "introvae": (IntroVaeConfig(margin=1.0, beta_rec=0.3), "batch", 1, 7),
    "vae": (VaeConfig(), "batch", 1, 5),
    "soft-recomputed": (SoftIntroVaeConfig(beta_neg=4.0, gamma_r=0.5), "batch", 1, 7),
    "soft-recomputed-one-image": (SoftIntroVaeConfig(beta_neg=4.0), "batch", 1, 1),
    "soft-once": (SoftIntroVaeConfig(beta_neg=4.0, gamma_r=0.5), "batch", 1, 7),
    "soft-once-recomputed": (SoftIntroVaeConfig(beta_neg=4.0), "batch", 1, 7),
    "soft-once-empty-micro-batches": (SoftIntroVaeConfig(beta_neg=4.0), "batch", 3, 1),
    "introvae-once": (IntroVaeConfig(margin=1.0, beta_rec=0.3), "batch", 1, 7),
    "style-recomputed": (SoftIntroVaeConfig(beta_neg=4.0, decoder_z="reencode", draws="fresh"), "style", 1, 7),
    "style": (SoftIntroVaeConfig(beta_neg=4.0, decoder_z="reencode", draws="fresh"), "style", 1, 7),
    "modulated": (SoftIntroVaeConfig(beta_neg=4.0), "modulated", 1, 7),
}
STYLE_LEVEL = 1  # of three: the parameters of the finest level are used by no rank


def global_batch(number: int, size: int, shape: tuple[int, ...]) -> Batch:
    """The whole batch of an iteration, from counters: the same everywhere."""
    position = torch.arange(number * size, (number + 1) * size)
    x = counters.normal(counters.key(5, "x"), position, shape, torch.float64).sigmoid()
    return Batch(x, position)


def share(batch: Batch, group: Group) -> Batch:
    """This rank's samples: every `ranks`-th, as lanes are owned."""
    mine = slice(group.rank, None, group.ranks)
    return Batch(batch.x[mine], batch.position[mine])


def run(case: str, group: Group, iterations: int = 3) -> Iterator[tuple[str, np.ndarray]]:
    objective, norm, accumulation, size = CASES[case]
    torch.manual_seed(0)
    if norm in ("style", "modulated"):  # which have instance norms only, or group norms
        model = (StyleConfig.tiny() if norm == "style" else ModulatedConfig.tiny()).build().double()
        model.set_level(STYLE_LEVEL if norm == "style" else 0)
        with torch.no_grad():  # noise would not matter yet
            for parameter in model.parameters():
                parameter.add_(0.1)
        optim = OptimConfig(PlayerOptim(beta1=0), PlayerOptim(beta1=0), "lreq_adam")
    else:
        model = ResidualConfig(image_size=SIZE, channels=(4, 6), zdim=5, norm=norm).build().double()
        optim = OptimConfig()
    synchronise_batch_norm(model, group)
    recompute_blocks(model, 0 if "recomputed" in case else None)
    players = {"encoder": model.encoder, "decoder": model.decoder}
    strategy = Replicated(players, optim.build(players), group, clip_norm=0.5)
    once = "once" in case
    step = Iteration(model, objective.build(model.sample_shape), strategy, accumulation=accumulation, decode_once=once)
    for number in range(iterations):
        gradients: dict[str, np.ndarray] = {}

        def observe(phase, _terms, gradients=gradients):
            for player in phase.trains:
                for name, parameter in players[player].named_parameters():
                    if parameter.grad is not None:
                        gradients[f"{phase.name}/{player}.{name}"] = parameter.grad.numpy().copy()

        batch = share(global_batch(number, size, model.sample_shape), group)
        report = step(batch, nimg=number * size, global_batch=size, observe=observe)
        assert report.skip is None
        for name, value in gradients.items():
            yield f"{case}/gradient{number}/{name}", value
        for key, total in report.sums.items():
            yield f"{case}/term{number}/{'/'.join(key)}", group.sum_(total.clone()).numpy()
    for name, value in model.state_dict().items():
        yield f"{case}/after/{name}", value.numpy().copy()


def collect(group: Group) -> dict[str, np.ndarray]:
    return {name: value for case in CASES for name, value in run(case, group)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    started = launch.start(DistributedConfig(ranks=int(sys.argv[2]), timeout_s=120))
    numbers = collect(started.group)
    # Every rank must hold the same weights, and the same running statistics.
    for name, value in numbers.items():
        if "/after/" in name:
            for other in started.group.gather(torch.from_numpy(value).reshape(1, -1)):
                assert np.array_equal(other.numpy().ravel(), value.ravel()), f"{name} differs between ranks"
    from probe_strategies import CORNER  # which imports this module
    from probe_strategies import collect as collect_cells

    numbers |= collect_cells(CORNER, started.group)
    if started.group.is_main:
        np.savez(sys.argv[1], **numbers)
    started.finish()
    os._exit(0)  # as the command line does: a destructor of the process group may abort a rank that exits normally

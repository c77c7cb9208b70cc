"""Speed of a 2-D Soft-IntroVAE iteration: the engine, beside a plain loop that does what the public code does.

The plain loop is written anew from its description (the fixtures' text, docs/quirks.md): points drawn one by one in
Python, every pass of both phases, a reconstruction from mu that is only looked at, the terms that gamma_r multiplies by
1e-8, checks for NaN that wait for the result, a scheduler step. Both do the same networks, batch, losses and Adam.

All take turns in blocks of iterations within one run, each in a process of its own, because how the C library keeps
memory cannot be taken back. Times are CPU seconds of that process on one thread, which other processes on the machine
disturb less than wall time. Medians over blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sivae_dist.apps.bench.turns import Start, in_turns
from sivae_dist.data import HostBatch
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.engine import host_memory
from sivae_dist.engine.config import RunConfig, from_dict, read_yaml
from sivae_dist.engine.ema import Ema
from sivae_dist.engine.iteration import Iteration
from sivae_dist.engine.meters import Meters
from sivae_dist.engine.precision import Precision
from sivae_dist.models import Autoencoder, Posterior
from sivae_dist.objectives import terms
from sivae_dist.ops import kernels
from sivae_dist.resources import configs_dir

BETA_REC, BETA_KL, BETA_NEG, SCALE, GAMMA_R = 0.2, 0.3, 0.9, 0.5, 1e-8
BATCH = 512
LATE = 1 << 40  # images after which no warm-up is left
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """Median CPU seconds of an iteration, and the part of them spent on making points."""

    name: str
    seconds: float
    data_s: float


def recipe() -> RunConfig:
    """configs/toy/8gaussians_soft_introvae.yaml."""
    path = configs_dir() / "toy" / "8gaussians_soft_introvae.yaml"
    return from_dict(read_yaml(path), str(path))


class Plain:
    """The transcription. data(): a batch, as the public code makes it; step(x): an iteration of its second stage."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = recipe().model.build()
        self.encoder, self.decoder, self.prior = self.model.encoder, self.model.decoder, self.model.prior
        self.adam_e = torch.optim.Adam(self.encoder.parameters(), lr=2e-4)
        self.adam_d = torch.optim.Adam(self.decoder.parameters(), lr=2e-4)
        self.schedules = [
            torch.optim.lr_scheduler.MultiStepLR(adam, [10_000, 15_000]) for adam in (self.adam_e, self.adam_d)
        ]

    def data(self) -> Tensor:
        """8 Gaussians, point by point."""
        centres = [(2 * math.cos(k * math.pi / 4), 2 * math.sin(k * math.pi / 4)) for k in range(8)]
        rows = []
        for _ in range(BATCH):
            centre = random.choice(centres)
            rows.append([(c + 0.02 * random.gauss(0, 1)) / 1.414 for c in centre])
        return torch.tensor(rows, dtype=torch.float32)

    def step(self, x: Tensor) -> None:
        """Encoder, then decoder, as docs/quirks.md tells."""
        z_prior = torch.randn(len(x), 2)
        self._train_only(self.encoder)
        fake = self.decoder(z_prior)
        q = self.encoder(x)
        z = self._z(q)
        rec = self.decoder(z)
        terms.reconstruction(x, self.decoder(self.encoder(x).mu).detach()).mean()  # only looked at
        loss = SCALE * (BETA_REC * terms.reconstruction(x, rec).mean() + BETA_KL * terms.kl(q, self.prior).mean())
        for made in (fake, rec):
            q_made = self.encoder(made.detach())
            again = terms.reconstruction(made, self.decoder(self._z(q_made)))
            elbo = -2 * SCALE * (BETA_REC * again + BETA_NEG * terms.kl(q_made, self.prior))
            loss = loss + 0.25 * elbo.exp().mean()
        self._step(self.adam_e, loss)

        self._train_only(self.decoder)
        fake, rec = self.decoder(z_prior), self.decoder(z.detach())
        loss_d = BETA_REC * terms.reconstruction(x, rec).mean()
        for made in (rec, fake):
            q_made = self.encoder(made)
            again = self.decoder(self._z(q_made).detach())
            loss_d = loss_d + 0.5 * BETA_KL * terms.kl(q_made, self.prior).mean()
            loss_d = loss_d + 0.5 * GAMMA_R * BETA_REC * terms.reconstruction(made.detach(), again).mean()
        self._step(self.adam_d, SCALE * loss_d)
        if bool(torch.isnan(loss)) or bool(torch.isnan(loss_d)):
            raise RuntimeError("loss is NaN")
        for schedule in self.schedules:
            schedule.step()

    def _train_only(self, player: torch.nn.Module) -> None:
        for module in (self.encoder, self.decoder):
            for parameter in module.parameters():
                parameter.requires_grad_(module is player)

    @staticmethod
    def _z(q: Posterior) -> Tensor:
        return q.mu + torch.randn_like(q.mu) * torch.exp(0.5 * q.logvar)

    @staticmethod
    def _step(adam: torch.optim.Adam, loss: Tensor) -> None:
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()


class Engine:
    """The trainer's loop body on the recipe: points, iteration, average, meters. config: what differs from it."""

    def __init__(self, config: RunConfig) -> None:
        torch.manual_seed(0)
        self.config = config
        self.model: Autoencoder = config.model.build()
        players = {"encoder": self.model.encoder, "decoder": self.model.decoder}
        self.optimizers = config.optim.build(players)
        self.iteration = Iteration(
            self.model,
            config.objective.build(self.model.sample_shape),
            Replicated(players, self.optimizers, Group()),
            precision=Precision(config.precision.resolved(), "cpu"),
            decode_once=config.train.decode_once,
        )
        self.ema, self.meters = Ema(config.ema, self.model), Meters(Group(), CPU)
        self.batches = config.data.build(seed=0, salt=0, rank=0, ranks=1).batches(0, BATCH)

    def data(self) -> HostBatch:
        """A batch of the stream, most of whose cost falls on the first of every 64."""
        return next(self.batches)

    def step(self, host_batch: HostBatch) -> None:
        """One iteration."""
        batch = host_batch.to(CPU, self.model.input_range)
        self.config.optim.apply(self.optimizers, 0)
        report = self.iteration(batch, nimg=LATE, global_batch=BATCH)
        self.ema.update(self.model, LATE, BATCH)
        self.meters.add(report, BATCH)


def contenders() -> dict[str, Callable[[], Plain | Engine]]:
    """By name: the plain loop first, then the recipe as it is and with one thing changed."""
    config = recipe()
    with_gamma_r = dataclasses.replace(config.objective, gamma_r=GAMMA_R)  # type: ignore[call-arg]
    bf16 = dataclasses.replace(config.precision, dtype="bf16")
    by_torch = dataclasses.replace(config.kernels, dense="torch")
    once = dataclasses.replace(config.train, decode_once=True)
    gives_back = dataclasses.replace(config.train, keep_freed_mb=0)
    return {
        "plain loop": Plain,
        "engine, recipe": lambda: Engine(config),
        "  gamma_r 1e-8": lambda: Engine(dataclasses.replace(config, objective=with_gamma_r)),
        "  kernels.dense torch": lambda: Engine(dataclasses.replace(config, kernels=by_torch)),
        "  train.keep_freed_mb 0": lambda: Engine(dataclasses.replace(config, train=gives_back)),
        "  both of these": lambda: Engine(dataclasses.replace(config, kernels=by_torch, train=gives_back)),
        "  train.decode_once true": lambda: Engine(dataclasses.replace(config, train=once)),
        "  precision.dtype bf16": lambda: Engine(dataclasses.replace(config, precision=bf16)),
    }


def run(seconds: float, block: int = 8) -> list[Row]:
    """Times all, about `seconds` of CPU time each, in turns."""
    starts: dict[str, Start[tuple[float, float]]] = {name: functools.partial(_start, name) for name in contenders()}
    times = in_turns(starts, seconds=seconds, spent=lambda parts: block * sum(parts), block=block)
    return [
        Row(name, statistics.median(a + b for a, b in parts), statistics.fmean(a for a, _ in parts))
        for name, parts in times.items()
    ]


def _start(name: str) -> Callable[[int], tuple[float, float]]:
    """One contender, on one thread."""
    torch.set_num_threads(1)
    each = contenders()[name]()
    if isinstance(each, Engine):  # as the trainer begins
        host_memory.keep_freed(each.config.train.keep_freed_mb)
        kernels.configure(each.config.kernels, CPU)
    return functools.partial(_block, each)


def _block(each: Plain | Engine, count: int) -> tuple[float, float]:
    """CPU seconds an iteration: points, the rest."""
    on_data = on_steps = 0.0
    for _ in range(count):
        begin = time.process_time()
        batch = each.data()
        middle = time.process_time()
        each.step(batch)  # type: ignore[arg-type]
        on_data += middle - begin
        on_steps += time.process_time() - middle
    return on_data / count, on_steps / count

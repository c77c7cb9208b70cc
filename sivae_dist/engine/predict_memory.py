"""What a run will need of its device's memory, told without allocating any of it.

The real training step (`Iteration`: the objective's phases, backward passes, optimizer steps, averaging) runs once on
fake tensors, which have shapes and types but no values, while `Storages` follows what is alive. So views, what autograd
saves and when it lets go, micro-batches, autocast and recomputed blocks are those of the real run. Its parts:

    total = weights + gradients + optimizer + average + data + activations

weights, average: parameters and buffers; gradients: of all parameters, since one player's stay while the other trains;
optimizer: its state; data: the bytes of a batch of pictures at the data's own resolution, those of the next one while
this one is trained on (as on a CUDA device); activations: everything else that is alive at the peak of the worst phase
(what autograd keeps, maps that are being computed, the images of the batch), or while the images are prepared.

Not included: workspaces that convolutions allocate for themselves, the slack and fragmentation of the memory allocator,
the device's own context (some hundred MiB on CUDA), evaluation and pictures, which keep nothing for a backward pass.
Half precision follows the CPU's list of operations for autocast, which for these networks is CUDA's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sivae_dist.data import Batch, HostBatch
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.distributed.sync_batch_norm import synchronise_batch_norm
from sivae_dist.engine.config import RunConfig
from sivae_dist.engine.ema import Ema
from sivae_dist.engine.iteration import Iteration, evenly
from sivae_dist.engine.loss_scale import LossScales
from sivae_dist.engine.precision import Dtype, Precision
from sivae_dist.engine.storages import Storages, bytes_of
from sivae_dist.engine.trainer import build_objective
from sivae_dist.models import Autoencoder
from sivae_dist.models.blocks import recompute_blocks
from sivae_dist.objectives import Phase, Terms

AFTER_WARMUP = 1 << 40  # images: past every warm-up


@dataclass(frozen=True)
class Case:
    """What to predict for.

    config:    the run
    images:    of this process in one iteration
    dtype:     of the networks' computations
    level:     of a network that grows; None: its finest
    processes: more than one: batch norm and gradients as they are then
    """

    config: RunConfig
    images: int
    dtype: Dtype
    level: int | None = None
    processes: int = 1


@dataclass
class Prediction:
    """Bytes; see the module's formula.

    resolution: pixels a side; 0 for points.
    data:       0 for points, which come as they are
    phases:     name -> activations at the peak of that phase; "images": while they are prepared; "steps": of the last
                step and the averaging
    """

    resolution: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    data: int
    total: int
    phases: dict[str, int] = field(default_factory=dict)

    @property
    def activations(self) -> int:
        """Of the worst phase."""
        return max(self.phases.values())


def predict(case: Case) -> Prediction:
    """The memory of one process. Raises UserError for a configuration that makes no network or objective."""
    with FakeTensorMode(), _Unread():  # type: ignore[no-untyped-call]
        return follow(case)


def follow(case: Case, iterations: int = 1) -> Prediction:
    """Builds everything, trains, and tells what was alive in a first iteration and will be in all that follow.

    On real tensors unless they are faked.
    """
    config, accumulation = case.config, case.config.train.accumulation
    passes = min(accumulation, case.images)
    if not config.train.decode_once:  # then all further micro-batches are like the second, or empty
        passes = min(passes, 2)
    with Storages() as storages:
        group = Silent(0, case.processes)
        model = _model(case, group)
        players = {"encoder": model.encoder, "decoder": model.decoder}
        optimizers = config.optim.build(players)
        strategy = Replicated(players, optimizers, group, clip_norm=config.optim.clip_norm)
        ema = Ema(config.ema, model, _model(case, group))
        iteration = Iteration(
            model,
            build_objective(config, model),
            strategy,
            accumulation=passes,
            precision=Precision(case.dtype),
            scales=LossScales(enabled=case.dtype == "fp16"),
            decode_once=config.train.decode_once,
        )
        iteration.split = evenly
        storages.take_peak()
        # From where it has become the batch on, the bytes stand for those of the next one, on its way meanwhile.
        host_batch = _host_batch(model, -(-case.images // accumulation) * passes)
        batch = _batch(config, model, host_batch)
        bytes_each = host_batch.data[:1].nbytes if host_batch.data.dtype == torch.uint8 else 0
        left_out = max(0, case.images - len(batch))  # images of the micro-batches left out
        waiting = left_out * (batch.x[:1].nbytes + bytes_each)

        # The peak of each phase, and what there was of gradients and optimizer state at its end.
        peaks: dict[str, tuple[int, int]] = {"images": (storages.take_peak(), 0)}

        def lasting() -> dict[str, int]:
            gradients = bytes_of(p.grad for p in model.parameters() if p.grad is not None)
            states = bytes_of(value for o in optimizers.values() for value in tensors_of(o.state))
            return {"gradients": gradients, "optimizer": states}

        def observe(phase: Phase, terms: Terms) -> None:
            peaks[phase.name] = storages.take_peak(), sum(lasting().values())

        for _ in range(iterations):
            report = iteration(batch, nimg=AFTER_WARMUP, global_batch=case.images * case.processes, observe=observe)
            if report.skip is not None:
                raise RuntimeError(f"not finite: {report.skip.text()}")
            ema.update(model, AFTER_WARMUP, case.images)
        parts = {
            "weights": bytes_of([*model.parameters(), *model.buffers()]),
            "average": bytes_of([*ema.model.parameters(), *ema.model.buffers()]),
            **(left := lasting()),
            "data": (len(batch) + left_out) * bytes_each,
        }
        peaks["steps"] = storages.take_peak(), sum(left.values())
    # From the second iteration on every phase begins with all gradients but its own, and with all optimizer state.
    totals = {phase: peak + sum(left.values()) - then + waiting for phase, (peak, then) in peaks.items()}
    held = sum(parts.values())
    return Prediction(
        resolution=model.sample_shape[-1] if len(model.sample_shape) == 3 else 0,
        phases={phase: total - held for phase, total in totals.items()},
        total=max(totals.values()),
        **parts,
    )


def tensors_of(state: Mapping[Any, Mapping[str, Any]]) -> Iterator[Tensor]:
    """The tensors of an optimizer's state."""
    return (value for values in state.values() for value in values.values() if isinstance(value, Tensor))


def _model(case: Case, group: Group) -> Autoencoder:
    """As the trainer builds it."""
    model = synchronise_batch_norm(case.config.model.build(), group)
    layout = _layout(case.config)
    for module in model.modules():  # module.to() cannot exchange fake tensors
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 4:
                setattr(module, name, nn.Parameter(parameter.detach().contiguous(memory_format=layout)))
    recompute_blocks(model, case.config.train.recompute_from)
    if case.level is not None:
        model.set_level(case.level)
    return model


def _host_batch(model: Autoencoder, images: int) -> HostBatch:
    """Pictures of the data's resolution, which is the model's finest, as bytes; points as they are."""
    shape = (images, *model.finest_shape)
    data = torch.randint(0, 256, shape, dtype=torch.uint8) if len(shape) == 4 else torch.rand(shape)
    label = torch.zeros(images, dtype=torch.int64) if model.condition_dim else None
    return HostBatch(data, torch.arange(images), label)


def _batch(config: RunConfig, model: Autoencoder, host_batch: HostBatch) -> Batch:
    """As the trainer prepares it."""
    size = model.sample_shape[-1]
    return host_batch.to(torch.device("cpu"), model.input_range, memory_format=_layout(config), size=size)


def _layout(config: RunConfig) -> torch.memory_format:
    return torch.channels_last if config.precision.channels_last else torch.contiguous_format


class Silent(Group):
    """One of several ranks, looked at alone: collectives leave its tensors as they are."""

    def sum_(self, tensor: Tensor) -> Tensor:
        """Nothing comes from the others."""
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Nothing comes from the others."""
        return tensor

    def broadcast_(self, module: nn.Module) -> None:
        """Keeps its own."""


class _Unread(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fake tensors have no values: where the host reads one (is everything finite?), it reads zero."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            return 0.0

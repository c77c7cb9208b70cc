"""Strategy `deepspeed`: ZeRO, one engine a player. Weights and gradients are whole on every rank, the state of
optimizers is in shards, on the host if wanted; with stage 2 summed gradients are in shards from the sum to the step.

Backward passes run as always and add up gradients where they are; one reduction follows the last (DeepSpeed's
`coalesce_grad_reduction`), so micro-batches and repeated forward passes cost no communication, and phases that train
both players work. Summing, clipping and stepping stay apart: accelerate's wrapper steps within the backward pass,
where nothing could look at the gradient first. Engines are made here, in the process group that accelerate has joined:
accelerate knows one engine a run.

A flat shard has one step count, and takes zeros for parameters without gradient where plain optimizers leave them
alone: those move on if they have momentum. (Growing networks have none, as published.)
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sivae_dist.distributed.config import DistributedConfig
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.distributed.strategy import Gradient, ParameterStates, Strategy, moments
from sivae_dist.errors import UserError

_BUCKET = 16_777_216  # numbers in a collective


class Zero(Strategy):
    """ZeRO of stage 1 or 2. offload: optimizer state and step on the host. float32 weights only."""

    name = "deepspeed"
    gradients_by_parameter = False

    def __init__(
        self,
        players: dict[str, nn.Module],
        optimizers: dict[str, Optimizer],
        group: Group,
        *,
        stage: int = 1,
        offload: bool = False,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(players, optimizers, group, clip_norm=clip_norm)
        self._device = _device_of(players)
        deepspeed = _library(self._device)
        self._engines: dict[str, Any] = {}
        self._scalars: dict[str, list[nn.Parameter]] = {}
        self._reductions: dict[str, AbstractContextManager[None]] = {}
        for name, player in players.items():
            self._scalars[name] = [parameter for parameter in player.parameters() if parameter.dim() == 0]
            # DeepSpeed sends weights to all ranks as bytes, and has no such view of scalars and of channels_last ones.
            for parameter in player.parameters():
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            for parameter in self._scalars[name]:
                parameter.data = parameter.data.view(1)
            with _quiet():
                engine, *_ = deepspeed.initialize(
                    model=player,
                    optimizer=optimizers[name],
                    config=settings(stage, self._device, offload=offload),
                    dist_init_required=False,
                )
            self._as_scalars(name)
            # The one that DeepSpeed makes for all its engines, with torch's own timeout.
            torch.distributed.distributed_c10d._set_pg_timeout(group.timeout, engine.data_parallel_group)
            self._engines[name] = engine
            zero = engine.optimizer
            for flat in zero.single_partition_of_fp32_groups:  # so that there is something to save before a first step
                zeros = {key: torch.zeros_like(flat, requires_grad=False) for key in moments(optimizers[name])}
                optimizers[name].state[flat] = {"step": torch.tensor(0.0), **zeros}
            zero._lazy_init_hp_params_optimizer_state()

    def train_only(self, names: Iterable[str]) -> None:
        """See Strategy. What a skipped phase left summed up is dropped."""
        chosen = set(names)
        self._freeze_all_but(chosen)
        for name in chosen:
            zero = self._engines[name].optimizer
            zero.zero_grad(set_to_none=True)
            zero.averaged_gradients.update(dict.fromkeys(zero.averaged_gradients))
            zero.all_grad_tensors.update(dict.fromkeys(zero.all_grad_tensors))
            zero.micro_step_id = -1
            if zero.cpu_offload:
                zero.reset_cpu_buffers()
                for flat in zero.single_partition_of_fp32_groups:
                    flat.grad.zero_()  # its padding, which no gradient overwrites, included
        self._reductions = {name: self._engines[name].coalesce_grad_reduction() for name in sorted(chosen)}
        for reduction in self._reductions.values():
            reduction.__enter__()

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulates gradients of a scalar."""
        loss.backward()  # type: ignore[no-untyped-call]

    def reduce(self, name: str, *, scale: float = 1.0) -> Gradient:
        """See Strategy. Norms are added up over shards in float64."""
        own = [p.grad for p in self.players[name].parameters() if p.grad is not None]
        local = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(own)))
        self.traffic.add(sum(gradient.nbytes for gradient in own), -(-sum(g.numel() for g in own) // _BUCKET))
        self._reductions.pop(name).__exit__(None, None, None)
        self._wait_for_sums(name)
        gradients = self._shards(name)
        # DeepSpeed has taken their mean over ranks. (A loss times the number of ranks would give the sum, too, but
        # three times a number rounds in bfloat16, in every layer that the gradient passes.)
        torch._foreach_mul_(gradients, self.group.ranks / scale)
        squares = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        norm = self.group.sum_(squares.to(local.device)).sqrt().to(local.dtype)
        self._clip(gradients, norm.to(gradients[0].device))
        return Gradient(norm, local)

    def step(self, name: str) -> None:
        """See Strategy; then every rank gets the weights that the others have stepped."""
        zero = self._engines[name].optimizer
        zero.step()
        self._as_scalars(name)
        self.traffic.add(sum(flat.nbytes for flat in zero.bit16_groups_flat), len(zero.bit16_groups_flat))

    def _as_scalars(self, name: str) -> None:
        for parameter in self._scalars[name]:
            parameter.data = parameter.data.view(())

    def gradients(self, name: str) -> dict[str, Tensor]:
        """This rank's part of the summed gradient, by number of the flat shard."""
        return {str(number): shard for number, shard in enumerate(self._shards(name))}

    def _shards(self, name: str) -> list[Tensor]:
        """This rank's part of the summed gradient, as the step will take it."""
        zero = self._engines[name].optimizer
        if zero.cpu_offload:
            return [flat.grad for flat in zero.single_partition_of_fp32_groups]
        return [part for group in zero.averaged_gradients.values() for part in group if part.numel()]

    def _wait_for_sums(self, name: str) -> None:
        """Waits until the sums are on the host: DeepSpeed lets them travel on, and waits itself only as it steps."""
        zero = self._engines[name].optimizer
        if not zero.cpu_offload or self._device.type != "cuda":
            return
        if hasattr(zero, "_wait_for_offload_copies"):  # 0.19.8; it knows the streams
            zero._wait_for_offload_copies()
        else:  # without overlap_comm, copies are on the stream of the rest
            torch.cuda.current_stream(self._device).synchronize()

    def optimizer_state(self, name: str) -> ParameterStates:
        """See Strategy: whole tensors, gathered one by one. Without a second moment a parameter was never stepped."""
        get = importlib.import_module("deepspeed.utils").safe_get_full_optimizer_state
        keys, step = moments(self.optimizers[name]), self._steps(name)
        states: ParameterStates = {}
        for parameter_name, parameter in self.parameters(name).items():
            state = {key: get(parameter, key) for key in keys}
            if bool(state["exp_avg_sq"].any()):
                states[parameter_name] = {"step": step.clone(), **state}
        return states

    def load_optimizer_state(self, name: str, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """See Strategy. Where step counts differ, the largest counts for all."""
        put = importlib.import_module("deepspeed.utils").safe_set_full_optimizer_state
        for parameter_name, parameter in self.parameters(name).items():
            stored = states.get(parameter_name, {})
            for key in moments(self.optimizers[name]):
                value = stored.get(key)
                put(parameter, torch.zeros_like(parameter) if value is None else value.to(parameter.device), key)
        steps = max((float(state["step"]) for state in states.values()), default=0.0)
        for state in self.optimizers[name].state.values():
            state["step"].fill_(steps)

    def forget(self) -> None:
        """See Strategy."""
        for optimizer in self.optimizers.values():
            for state in optimizer.state.values():
                for value in state.values():
                    value.zero_()

    def weights_changed(self) -> None:
        """See Strategy: the steps work on copies of the weights."""
        for engine in self._engines.values():
            engine.optimizer.zero_grad(set_to_none=True)
            engine.optimizer.refresh_fp32_params()

    def _steps(self, name: str) -> Tensor:
        steps: list[Tensor] = [state["step"].detach().cpu() for state in self.optimizers[name].state.values()]
        return max(steps, key=float)


def settings(stage: int, device: torch.device, *, offload: bool) -> dict[str, object]:
    """DeepSpeed's configuration of one engine. Everything that concerns batches, precision and clipping is ours."""
    zero: dict[str, object] = {
        "stage": stage,
        "overlap_comm": False,
        "contiguous_gradients": False,
        "reduce_scatter": False,  # what it does instead on equal buckets is slower, and no reduce-scatter either
        "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": 1 << 40,
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # unused: batches never pass through the engine
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "steps_per_print": 1 << 62,
    }


def _device_of(players: Mapping[str, nn.Module]) -> torch.device:
    """Where the players are."""
    return next(parameter.device for player in players.values() for parameter in player.parameters())


def _library(device: torch.device) -> Any:
    """The module deepspeed, attached to the running process group. Raises UserError where it cannot be had.

    device: where the players are, which it is told as it is imported: by itself it takes a GPU wherever there is one.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        with _quiet():
            deepspeed = importlib.import_module("deepspeed")
    except Exception as error:  # it probes compilers and devices as it is imported
        raise UserError(
            f"the strategy deepspeed needs the package deepspeed, which cannot be imported: {error}"[:500],
            "pip install -c constraints.txt deepspeed, or use another strategy; `sivae-dist doctor` looks at it",
        ) from error
    # On CPUs it would compile a library for shared memory first, for minutes, in every rank at once; where such a
    # build was killed, later ones wait for its lock for ever. gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with _quiet():
        deepspeed.init_distributed(
            dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, dist_init_required=False
        )
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """It logs and prints its settings; only warnings should be seen."""
    level = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)


def build(
    config: DistributedConfig,
    players: dict[str, nn.Module],
    optimizers: dict[str, Optimizer],
    group: Group,
    *,
    clip_norm: float | None = None,
) -> Strategy:
    """The strategy as configured, or by the accelerate config. One rank has nothing to shard: it gets `ddp`."""
    if any(p.dtype != torch.float32 for player in players.values() for p in player.parameters()):
        raise UserError("ZeRO keeps weights in float32, and a player has others", "use the strategy ddp or fsdp2")
    if group.ranks == 1:
        if config.zero_offload:
            raise UserError(
                "distributed.zero_offload is True, but there is one rank", "start two or more, or set it off"
            )
        return Replicated(players, optimizers, group, clip_norm=clip_norm)
    return Zero(players, optimizers, group, stage=config.zero_stage, offload=config.zero_offload, clip_norm=clip_norm)

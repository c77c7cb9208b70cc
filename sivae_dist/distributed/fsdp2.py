"""Strategy `fsdp2`: weights, gradients and optimizer state are cut into shards, one a rank (torch's `fully_shard`).

Each *unit* of a player is gathered before it runs, forward and backward, and given back afterwards. Gradients are
summed as shards while the backward goes on: once for every time that a unit ran in the phase, since torch has no way to
wait for the last. Micro-batches but the last of a phase add up whole gradients instead, without communication.

Units are the player's children and the entries of its ModuleLists that have at least `unit_parameters` parameters, or
what the player's own `shard_units()` names; what is left is the player's own unit. A unit must be used by calling it.
With `shard_ranks` below the number of ranks, shards are spread over groups of that many ranks (neighbours, hence
usually one machine) and gradients are summed over groups besides (hybrid sharding).

Weights stay in their own format: torch's MixedPrecisionPolicy with a 16-bit param_dtype fails once a player is frozen
and thawed ("attempting to assign a gradient with dtype"), while autocast, which the engine uses, casts within units.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from sivae_dist.distributed.config import DistributedConfig
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.distributed.sharding import local
from sivae_dist.distributed.strategy import Gradient, Strategy, Traffic
from sivae_dist.errors import UserError

# Of the outputs of players, which are views here and there: nobody changes them in place.
warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")

# Newer names for the same; the old ones warn.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Sharded(Strategy):
    """Both players in shards. Parameters are DTensors, and so is the state of plain optimizers over them.

    mesh: one dimension (shards), or two (copies of the whole, shards). unit_parameters: least size of a unit.
    keep_whole: units stay gathered between forward and backward: more memory, half the gathering.
    """

    name = "fsdp2"

    def __init__(
        self,
        players: dict[str, nn.Module],
        optimizers: dict[str, Optimizer],
        group: Group,
        mesh: DeviceMesh,
        *,
        unit_parameters: int,
        keep_whole: bool = False,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(players, optimizers, group, clip_norm=clip_norm)
        self.copies = mesh.size(0) if mesh.ndim == 2 else 1
        self._trained: list[str] = []
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._units: dict[str, list[FSDPModule]] = {}
        self._whole: dict[str, list[nn.Parameter]] = {}  # scalars, which cannot be cut
        for name, player in players.items():
            for parameter in player.parameters():  # torch cuts contiguous tensors only, not channels_last ones
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            before = {key: id(parameter) for key, parameter in player.named_parameters()}
            whole = self._whole[name] = [parameter for parameter in player.parameters() if parameter.dim() == 0]
            for part in [*units(player, unit_parameters), player]:
                fully_shard(part, mesh=mesh, reshard_after_forward=not keep_whole, ignored_params=set(whole))
            self._units[name] = [module for module in player.modules() if isinstance(module, FSDPModule)]
            for unit in self._units[name]:
                unit.set_gradient_divide_factor(1.0)  # sums: losses are divided by the global batch already
                unit.set_force_sum_reduction_for_comms(True)
                unit.set_custom_all_gather(_CountedAllGather(self.traffic))  # type: ignore[arg-type]
                unit.set_custom_reduce_scatter(_CountedReduceScatter(self.traffic, self.copies))  # type: ignore[arg-type]
            self._parameters[name] = dict(player.named_parameters())
            twins = {before[key]: parameter for key, parameter in self._parameters[name].items()}
            for settings in optimizers[name].param_groups:
                settings["params"] = [twins[id(parameter)] for parameter in settings["params"]]

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The player's shards, also while a unit is gathered."""
        return self._parameters[name]

    def train_only(self, names: Iterable[str]) -> None:
        """See Strategy. Units that only ran forward since (and so are still gathered) are given back first."""
        self._trained = sorted(set(names))
        for modules in self._units.values():
            for unit in modules:
                unit.reshard()
        super().train_only(self._trained)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulates gradients of a scalar; sums shards over ranks in the last one."""
        for name in self._trained:
            self.players[name].set_requires_gradient_sync(last)  # type: ignore[operator]
        loss.backward()  # type: ignore[no-untyped-call]

    def reduce(self, name: str, *, scale: float = 1.0) -> Gradient:
        """See Strategy. Norms are added up over shards in float64."""
        whole = [p.grad for p in self._whole[name] if p.grad is not None]
        if whole:
            flat = self.group.sum_(torch.stack(whole))
            self.traffic.add(flat.nbytes)
            torch._foreach_copy_(whole, list(flat.unbind()))
        shards = [local(p.grad) for p in self._parameters[name].values() if p.dim() and p.grad is not None]
        gradients = [*shards, *whole]
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / scale)
        squares = self.group.sum_(_square(shards, gradients[0])) / self.copies + _square(whole, gradients[0])
        norm = squares.sqrt().to(gradients[0].dtype)
        self._clip(gradients, norm)
        return Gradient(norm, torch.zeros_like(norm))

    def follow(self, copy: nn.Module, original: nn.Module) -> None:
        """See Strategy: the copy's parameters become DTensors as its original's are, without being units."""
        weights = original.state_dict()
        for prefix, module in copy.named_modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                twin = weights[f"{prefix}.{leaf}" if prefix else leaf].detach().clone()
                setattr(module, leaf, nn.Parameter(twin, requires_grad=parameter.requires_grad))
        for name, buffer in copy.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])


def mesh_of(group: Group, shard_ranks: int, kind: str) -> DeviceMesh:
    """All ranks on devices of that kind as (shards,), or as (copies, shards) where shard_ranks is less. Collective.

    torch's init_device_mesh would make process groups with a timeout of torch's own.
    """
    if shard_ranks == group.ranks:
        assert dist.group.WORLD is not None
        return DeviceMesh.from_group(dist.group.WORLD, kind, mesh_dim_names=("shard",))
    ranks = torch.arange(group.ranks).view(-1, shard_ranks)
    copies, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=group.timeout)  # type: ignore[no-untyped-call]
    shards, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=group.timeout)  # type: ignore[no-untyped-call]
    return DeviceMesh.from_group([copies, shards], kind, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def units(player: nn.Module, least: int) -> list[nn.Module]:
    """The parts of a player that are gathered one by one: see the module's text."""
    own = getattr(player, "shard_units", None)
    if callable(own):
        return list(own())
    return [child for child in _children(player) if sum(p.numel() for p in child.parameters()) >= least]


def _children(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from _children(child)
        else:
            yield child


def _square(gradients: list[Tensor], like: Tensor) -> Tensor:
    """The sum of all squares, a float64 scalar."""
    if not gradients:
        return like.new_zeros((), dtype=torch.float64)
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum()


class _Counted:
    """A collective of a unit as torch does it by default, counted."""

    def __init__(self, traffic: Traffic, copies: int = 1) -> None:
        self.traffic, self.copies = traffic, copies

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _CountedAllGather(_Counted):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        self.traffic.add(output_tensor.nbytes)
        return _gather(output_tensor, input_tensor, group=group, async_op=async_op)


class _CountedReduceScatter(_Counted):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        self.traffic.add(input_tensor.nbytes)
        if self.copies > 1:  # torch then sums the shard over the copies
            self.traffic.add(output_tensor.nbytes)
        return _scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def build(
    config: DistributedConfig,
    players: dict[str, nn.Module],
    optimizers: dict[str, Optimizer],
    group: Group,
    *,
    clip_norm: float | None = None,
) -> Strategy:
    """The strategy as configured, or by the accelerate config. One rank has nothing to shard: it gets `ddp`."""
    if group.ranks == 1:
        return Replicated(players, optimizers, group, clip_norm=clip_norm)
    shard_ranks = config.shard_ranks or group.ranks
    if group.ranks % shard_ranks:
        raise UserError(
            f"distributed.shard_ranks is {shard_ranks}, which does not divide {group.ranks} ranks",
            f"use a divisor of {group.ranks}, or leave it out: all ranks share one copy then",
        )
    kind = next(p.device.type for player in players.values() for p in player.parameters())
    return Sharded(
        players,
        optimizers,
        group,
        mesh_of(group, shard_ranks, kind),
        unit_parameters=config.unit_parameters,
        keep_whole=config.keep_whole,
        clip_norm=clip_norm,
    )

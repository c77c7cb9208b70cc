"""How ranks share two players: what every strategy does for the engine, and the plain way of doing it.

A strategy holds the players and their optimizers. For each phase the engine calls, on all ranks in the same order:

    train_only(players)                     the others are frozen, gradients cleared
    backward(loss) for each micro-batch     `last` on the last one; loss: local per-sample sums / global batch
    reduce(player) for each player          the gradient is now the SUM over ranks, clipped; -> Gradient
    step(player) for each player            unless something was not finite

Ranks may hold different numbers of samples, none included: a rank without samples runs the same forward and backward
passes on empty tensors, so that collectives inside of them meet.

Tensors of a state (weights, average, optimizer state) are what this rank holds: whole, or a DTensor of which it holds
a shard. sharding.py turns either into whole tensors on the host and back; torch.distributed.checkpoint takes them as
they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sivae_dist.distributed.group import Group
from sivae_dist.distributed.sharding import put

ParameterStates = dict[str, dict[str, Tensor]]  # name within the player -> name of the state -> tensor


def moments(optimizer: Optimizer) -> tuple[str, ...]:
    """Names of the state tensors that have a parameter's shape: Adam's, unless the optimizer says otherwise."""
    names: tuple[str, ...] = getattr(optimizer, "moments", ("exp_avg", "exp_avg_sq"))
    return names


@dataclass(frozen=True)
class Gradient:
    """What is known of a player's gradient once it is summed over ranks; scalar tensors, nothing read back.

    norm:  its norm before clipping, the same on all ranks. Non-finite exactly if some entry is, on any rank (or the
           norm overflows), so all ranks take the same decision from it.
    local: the norm (up to the order of sums) of this rank's part alone: tells which rank a non-finite entry is from.
           Zero with strategies that never hold a rank's part as a whole.
    """

    norm: Tensor
    local: Tensor


@dataclass
class Traffic:
    """What training sent, counted on this rank: collectives of gradients and weights since the last `take`.

    bytes: of the whole tensors handed to them, before any algorithm's factor (a ring all-reduce moves nearly twice
           that over each link, an all-gather and a reduce-scatter once).
    """

    bytes: int = 0
    collectives: int = 0
    steps: int = 0  # iterations

    def add(self, nbytes: int, collectives: int = 1) -> None:
        """Counts collectives over `nbytes` in all."""
        self.bytes += nbytes
        self.collectives += collectives

    def take(self) -> dict[str, float]:
        """The tags `dist/...`, means an iteration, and begins anew."""
        steps = max(self.steps, 1)
        values = {"dist/bytes_per_step": self.bytes / steps, "dist/collectives_per_step": self.collectives / steps}
        self.bytes = self.collectives = self.steps = 0
        return values


class Strategy(ABC):
    """Players and optimizers under one way of sharing the work. `players` and `optimizers` share their keys.

    optimizers: those whose parameter groups hold the learning rates. clip_norm: upper bound of a gradient's norm.
    """

    name: ClassVar[str]
    gradients_by_parameter: ClassVar[bool] = True  # else `gradients` gives this rank's flat shards
    keeps_graphs: ClassVar[bool] = False  # a graph made in one phase may be run through backwards in a later one

    def __init__(
        self,
        players: dict[str, nn.Module],
        optimizers: dict[str, Optimizer],
        group: Group | None = None,
        *,
        clip_norm: float | None = None,
    ) -> None:
        self.players, self.optimizers, self.group = players, optimizers, group or Group()
        self.clip_norm = clip_norm
        self.traffic = Traffic()
        for player in players.values():
            self.group.broadcast_(player)

    def train_only(self, names: Iterable[str]) -> None:
        """Freezes every player but `names`, and clears the gradients of those.

        A frozen player still passes gradients through; it only computes none for its own weights.
        """
        chosen = set(names)
        self._freeze_all_but(chosen)
        for name in chosen:
            self.optimizers[name].zero_grad(set_to_none=True)

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulates gradients of a scalar. last: no further backward follows before `reduce`."""

    @abstractmethod
    def reduce(self, name: str, *, scale: float = 1.0) -> Gradient:
        """Sums the player's gradients over ranks, divides them by `scale` (what the loss was multiplied by), clips."""

    def step(self, name: str) -> None:
        """One optimizer step of a player."""
        self.optimizers[name].step()

    def optimizer_state(self, name: str) -> ParameterStates:
        """The state of a player's optimizer; parameters that were never stepped are absent. Collective."""
        optimizer = self.optimizers[name]
        return {
            parameter_name: {key: value for key, value in optimizer.state[parameter].items() if torch.is_tensor(value)}
            for parameter_name, parameter in self._held(name).items()
            if optimizer.state.get(parameter)
        }

    def load_optimizer_state(self, name: str, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes up a state of whole tensors (or of such as `optimizer_state` gives); absent parameters have none.

        State tensors of a parameter's shape lie in memory as the parameter does, all others on the host (Adam's count).
        """
        state = self.optimizers[name].state
        for parameter_name, parameter in self._held(name).items():
            state.pop(parameter, None)
            if stored := states.get(parameter_name):
                state[parameter] = {
                    key: put(torch.empty_like(parameter, requires_grad=False), value)
                    if value.shape == parameter.shape and key != "step"
                    else value.detach().to("cpu", torch.float32, copy=True)
                    for key, value in stored.items()
                }

    def forget(self) -> None:
        """Empties the state of all optimizers, as before the first step."""
        for optimizer in self.optimizers.values():
            optimizer.state.clear()

    def weights_changed(self) -> None:
        """To be called after weights were overwritten from outside: gradients go, what comes of weights follows."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def follow(self, copy: nn.Module, original: nn.Module) -> None:
        """A copy that was made before the strategy took over becomes like its original: weights, distribution."""
        copy.load_state_dict(original.state_dict())

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of a player by their names in it."""
        return dict(self.players[name].named_parameters())

    def _freeze_all_but(self, names: set[str]) -> None:
        for name in self.players:
            for parameter in self.parameters(name).values():
                parameter.requires_grad_(name in names)

    def gradients(self, name: str) -> dict[str, Tensor]:
        """What the next step will take, after `reduce`: by parameter, those without a gradient left out."""
        return {key: p.grad for key, p in self.parameters(name).items() if p.grad is not None}

    def _held(self, name: str) -> dict[str, nn.Parameter]:
        held = {id(p) for group in self.optimizers[name].param_groups for p in group["params"]}
        return {key: p for key, p in self.parameters(name).items() if id(p) in held}

    def _clip(self, gradients: list[Tensor], norm: Tensor) -> None:
        if self.clip_norm is not None:
            torch._foreach_mul_(gradients, torch.clamp(self.clip_norm / (norm + 1e-6), max=1.0))

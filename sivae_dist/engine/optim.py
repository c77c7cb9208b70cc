"""Optimizers and learning rates, one optimizer a player, progress counted in thousands of images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from sivae_dist.engine.lreq_adam import LreqAdam
from sivae_dist.errors import UserError


@dataclass(frozen=True)
class PlayerOptim:
    """Settings of one player's optimizer; the defaults are the published ones of the residual networks."""

    lr: float = 2e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.lr <= 0 or not 0 <= self.beta1 < 1 or not 0 <= self.beta2 < 1 or self.eps <= 0:
            raise UserError(
                f"optim: lr {self.lr}, beta1 {self.beta1}, beta2 {self.beta2}, eps {self.eps} are not all in range",
                "lr and eps must be positive, beta1 and beta2 in [0, 1)",
            )


@dataclass(frozen=True)
class OptimConfig:
    """Optimizers of both players and the common learning-rate schedule.

    Networks with equalised learning rates (style) multiply the rate parameter by parameter, whatever the optimizer.
    """

    encoder: PlayerOptim = field(default_factory=PlayerOptim)
    decoder: PlayerOptim = field(default_factory=PlayerOptim)
    name: Literal["adam", "lreq_adam"] = "adam"
    """adam, or lreq_adam: the one the style network was published with (no first moment: set beta1 to 0, and beta2
    0.99 as published)."""
    warmup_kimg: float = 0.0
    """The learning rate rises linearly from 0 over this many thousand images."""
    milestones_kimg: tuple[float, ...] = ()
    """At each of these the learning rate is multiplied by `decay`."""
    decay: float = 0.1
    clip_norm: float | None = None
    """Upper bound of each player's gradient norm per step; None leaves gradients as they are (as published)."""

    def __post_init__(self) -> None:
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise UserError(
                f"optim.clip_norm is {self.clip_norm}, expected a number > 0",
                "leave it out (None) to leave gradients as they are",
            )
        if self.decay <= 0 or self.warmup_kimg < 0 or any(milestone < 0 for milestone in self.milestones_kimg):
            raise UserError(
                f"optim: decay {self.decay}, warmup_kimg {self.warmup_kimg}, milestones_kimg {self.milestones_kimg} "
                "are not all in range",
                "decay must be positive, warmup_kimg and the milestones 0 or more",
            )
        for player, settings in (("encoder", self.encoder), ("decoder", self.decoder)):
            if self.name == "lreq_adam" and settings.beta1 != 0:
                raise UserError(
                    f"optim.{player}.beta1 is {settings.beta1}, but lreq_adam has no first moment",
                    f"set optim.{player}.beta1 to 0, or optim.name to adam",
                )

    def factor(self, nimg: int) -> float:
        """What the learning rates are multiplied by for the iteration that starts after `nimg` images."""
        kimg = nimg / 1000
        ramp = min(1.0, kimg / self.warmup_kimg) if self.warmup_kimg > 0 else 1.0
        return ramp * self.decay ** sum(kimg >= milestone for milestone in self.milestones_kimg)

    def build(self, players: dict[str, nn.Module]) -> dict[str, Optimizer]:
        """One optimizer a player, over all its parameters (plain implementations: the same on every device)."""
        return {
            name: self._optimizer(players[name], settings)
            for name, settings in (("encoder", self.encoder), ("decoder", self.decoder))
        }

    def _optimizer(self, player: nn.Module, settings: PlayerOptim) -> Optimizer:
        groups = parameter_groups(player, settings.lr)
        if self.name == "lreq_adam":
            return LreqAdam(groups, lr=settings.lr, beta2=settings.beta2, eps=settings.eps)
        return torch.optim.Adam(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps)

    def apply(self, optimizers: dict[str, Optimizer], nimg: int, lr: float | None = None) -> dict[str, float]:
        """Sets the learning rates due at `nimg`; returns them by player, without the parameters' multipliers.

        lr: replaces both players' own (progressive growing has one a level).
        """
        own = {"encoder": lr or self.encoder.lr, "decoder": lr or self.decoder.lr}
        rates = {player: rate * self.factor(nimg) for player, rate in own.items()}
        for name, rate in rates.items():
            for group in optimizers[name].param_groups:
                group["lr"] = rate * group["multiplier"]
        return rates


def parameter_groups(player: nn.Module, lr: float) -> list[dict[str, object]]:
    """One group for each learning-rate multiplier that the player's `lr_multipliers()` knows (1 for all others)."""
    own = getattr(player, "lr_multipliers", None)
    known: dict[str, float] = own() if callable(own) else {}
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in player.named_parameters():
        groups.setdefault(known.get(name, 1.0), []).append(parameter)
    return [
        {"params": params, "lr": lr * multiplier, "multiplier": multiplier} for multiplier, params in groups.items()
    ]

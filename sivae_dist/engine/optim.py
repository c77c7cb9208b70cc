"""Optimizers and learning rates, one optimizer a player, progress counted in thousands of images."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import Optimizer

from sivae_dist.errors import UserError


@dataclass(frozen=True)
class PlayerOptim:
    """Adam for one player; the defaults are the published ones."""

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
    """Optimizers of both players and the common learning-rate schedule."""

    encoder: PlayerOptim = field(default_factory=PlayerOptim)
    decoder: PlayerOptim = field(default_factory=PlayerOptim)
    warmup_kimg: float = 0.0
    """The learning rate rises linearly from 0 over this many thousand images."""
    milestones_kimg: tuple[float, ...] = ()
    """At each of these the learning rate is multiplied by `decay`."""
    decay: float = 0.1
    clip_norm: float | None = None
    """Upper bound of each player's gradient norm per step; None leaves gradients as they are (as published)."""

    def factor(self, nimg: int) -> float:
        """What the learning rates are multiplied by for the iteration that starts after `nimg` images."""
        kimg = nimg / 1000
        ramp = min(1.0, kimg / self.warmup_kimg) if self.warmup_kimg > 0 else 1.0
        return ramp * self.decay ** sum(kimg >= milestone for milestone in self.milestones_kimg)

    def build(self, players: dict[str, nn.Module]) -> dict[str, Optimizer]:
        """One Adam a player, over all its parameters (torch's plain implementation: the same on every device)."""
        return {
            name: torch.optim.Adam(
                players[name].parameters(), lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps
            )
            for name, settings in (("encoder", self.encoder), ("decoder", self.decoder))
        }

    def apply(self, optimizers: dict[str, Optimizer], nimg: int) -> dict[str, float]:
        """Sets the learning rates due at `nimg`; returns them by player."""
        rates = {"encoder": self.encoder.lr * self.factor(nimg), "decoder": self.decoder.lr * self.factor(nimg)}
        for name, rate in rates.items():
            for group in optimizers[name].param_groups:
                group["lr"] = rate
        return rates

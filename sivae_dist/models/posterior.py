"""Diagonal Gaussians: the posterior an encoder returns and the prior the decoder is fed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# exp(logvar) and its inverse stay finite in float32 within these bounds; published runs never come near them.
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


@dataclass
class Posterior:
    """q(z|x) = N(mu, exp(logvar)), diagonal. mu, logvar: (B, *latent shape).

    logvar is bounded to [LOGVAR_MIN, LOGVAR_MAX]: a run-away head then gives a large but finite KL, not an infinity.
    """

    mu: Tensor
    logvar: Tensor

    def __post_init__(self) -> None:
        self.logvar = self.logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)

    def sample(self, eps: Tensor) -> Tensor:
        """z = mu + eps * exp(logvar / 2) (the reparameterisation trick), (B, *latent shape)."""
        return self.mu + eps * torch.exp(0.5 * self.logvar)


@dataclass(frozen=True)
class Prior:
    """p(z) = N(mu, exp(logvar)) over latents of `shape`, the same for every dimension."""

    shape: tuple[int, ...]
    mu: float = 0.0
    logvar: float = 0.0

    def sample(self, eps: Tensor) -> Tensor:
        """z_prior from standard normal eps (B, *shape)."""
        return self.mu + eps * float(torch.tensor(0.5 * self.logvar, dtype=torch.float64).exp())

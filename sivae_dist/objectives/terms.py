"""The terms all objectives are made of, per sample, in float32 or better.

Every function returns (B,). Half-precision inputs are widened first and autocast is switched off, so sums over millions
of pixels and exponentials never happen in 16 bits; float64 stays float64. Units: rec in squared input units (mse),
absolute input units (l1) or nats (bce), summed over the data dimensions; kl in nats; elbo is scaled by `scale`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sivae_dist.objectives.base import Gaussian, Prior

RecLoss = Literal["mse", "l1", "bce"]


def wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def reconstruction(x: Tensor, x_hat: Tensor, kind: RecLoss = "mse") -> Tensor:
    """Reconstruction error of x_hat (B, ...) against the target x (B, ...), summed over the data dimensions: (B,).

    mse: sum (x - x_hat)^2, minus log-likelihood under N(x_hat, 1/2) up to a constant (IntroVAE eq. 10 without its 1/2)
    l1:  sum |x - x_hat|
    bce: - sum x log x_hat + (1 - x) log(1 - x_hat); x_hat must hold probabilities. Outside [0, 1] the result is nan,
         which the engine reports; a network with an unbounded output cannot be trained with it.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _REC[kind](wide(x).flatten(1), wide(x_hat).flatten(1)).sum(1)


def _binary_cross_entropy(x: Tensor, p: Tensor) -> Tensor:
    # Written out because torch's own stops the process on a CUDA device when p leaves [0, 1]. The bound keeps the
    # logarithm and its gradient finite at 0 and 1.
    tiny = torch.finfo(p.dtype).tiny
    value = -(x * p.clamp(min=tiny).log() + (1 - x) * (1 - p).clamp(min=tiny).log())
    return torch.where((p >= 0) & (p <= 1), value, math.nan)


_REC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda x, x_hat: (x_hat - x).square(),
    "l1": lambda x, x_hat: (x_hat - x).abs(),
    "bce": _binary_cross_entropy,
}


def kl(q: Gaussian, prior: Prior) -> Tensor:
    """KL(q || prior) in nats, both diagonal Gaussians: (B,). IntroVAE eq. 9 (whose sign is a misprint) for N(0, 1).

    1/2 sum over latents of  exp(logvar - logvar_p) + (mu - mu_p)^2 exp(-logvar_p) - 1 - (logvar - logvar_p)
    """
    with torch.autocast(q.mu.device.type, enabled=False):
        mu, logvar = wide(q.mu), wide(q.logvar)
        excess = logvar - prior.logvar
        precision = torch.exp(-prior.logvar) if isinstance(prior.logvar, Tensor) else math.exp(-prior.logvar)
        per_latent = excess.exp() + (mu - prior.mu).square() * precision - 1 - excess
        return 0.5 * per_latent.flatten(1).sum(1)


def reparameterize(q: Gaussian, eps: Tensor) -> Tensor:
    """z = mu + eps exp(logvar / 2), (B, ...), for standard normal eps."""
    with torch.autocast(q.mu.device.type, enabled=False):
        return wide(q.mu) + wide(eps) * torch.exp(0.5 * wide(q.logvar))


def sample_prior(prior: Prior, eps: Tensor) -> Tensor:
    """z ~ prior from standard normal eps (B, *prior.shape)."""
    std = torch.exp(0.5 * prior.logvar) if isinstance(prior.logvar, Tensor) else math.exp(0.5 * prior.logvar)
    return prior.mu + wide(eps) * std


def elbo(rec: Tensor, kl_: Tensor, *, scale: float, beta_rec: float, beta_kl: float) -> Tensor:
    """Scaled evidence lower bound -scale (beta_rec rec + beta_kl kl) from (B,) terms: (B,)."""
    return -scale * (beta_rec * rec + beta_kl * kl_)


def exp_elbo(elbo_: Tensor, alpha: float) -> Tensor:
    """exp(alpha ELBO) per sample (never the exponential of a batch mean): (B,), in (0, 1] since the ELBO is <= 0."""
    return torch.exp(alpha * elbo_)


def detached(**terms: Tensor) -> dict[str, Tensor]:
    """Named terms for reports, without gradient."""
    return {name: value.detach() for name, value in terms.items()}


def require(condition: bool, field: str, value: object, expected: str) -> None:
    """Checks one configuration value. Raises ValueError (objectives import nothing but torch)."""
    if not condition:
        raise ValueError(f"objective.{field} is {value!r}, expected {expected}")

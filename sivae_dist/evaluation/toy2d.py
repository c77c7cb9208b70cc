"""How well samples and ELBO of a model of 2-D points fit the data: the published measures, and correct ones in nats.

Published (`published_*`, `gnelbo`), for comparison with numbers from the public Soft-IntroVAE code. They are not what
their names say: the "KL" and "JSD" sum densities over bins without the bins' area and divide by the bins of one axis,
the JSD runs from the mixture to its parts, so their unit depends on bins and range; the grid-normalised ELBO divides a
mean by a sum over a grid, so it shrinks with the number of grid points.

Correct (`histogram_kl`, `histogram_jsd`, `grid_nll`): probabilities of cells, nats, lower is better everywhere.

Points are (N, 2) tensors, squares are centred at the origin with half side `extent`, grids have the first coordinate
varying slowest. energy(x (B, 2)) -> (B,) is the negative ELBO n(x) of points, with exp(-n) standing for a density.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sivae_dist.errors import UserError
from sivae_dist.objectives import Players, terms

Energy = Callable[[Tensor], Tensor]

BINS = 100  # bins per axis of the published evaluation
PSEUDO_COUNT = 0.5  # of every cell of the model's histogram in `histogram_kl`
_TINY = 1e-14  # what the public code adds to densities within logarithms


def counts(x: Tensor, extent: float, bins: int = BINS) -> Tensor:
    """(bins, bins) float64: points per cell of [-extent, extent]^2; what lies outside, or is not finite, is left out.

    Cells are half open but for the last of an axis, as in numpy.histogram2d.
    """
    if x.dim() != 2 or x.shape[1] != 2:
        raise ValueError(f"points are (N, 2), not {tuple(x.shape)}")
    edges = torch.linspace(-extent, extent, bins + 1, dtype=torch.float64)
    points = x.detach().cpu().double()
    cell = torch.searchsorted(edges, points.contiguous(), right=True) - 1
    cell = torch.where(points == extent, bins - 1, cell)
    inside = ((cell >= 0) & (cell < bins) & points.isfinite()).all(1)
    flat = cell[inside, 0] * bins + cell[inside, 1]
    return torch.bincount(flat, minlength=bins * bins).double().reshape(bins, bins)


def density(x: Tensor, extent: float, bins: int = BINS) -> Tensor:
    """(bins, bins) float64: histogram density, which integrates to 1 over the square. Raises UserError if it is empty.

    Points outside the square are as if they had not been drawn, as published.
    """
    found = counts(x, extent, bins)
    if not found.sum() > 0:
        raise UserError(f"none of {len(x)} points lies within {extent} of the origin", "train longer, or look at it")
    return found / (found.sum() * (2 * extent / bins) ** 2)


def published_kl(real: Tensor, fake: Tensor, extent: float, bins: int = BINS) -> float:
    """(1/bins) sum p (log p - log(q + 1e-14)) over cells with p > 0, p and q densities."""
    return _published(density(real, extent, bins), density(fake, extent, bins))


def published_jsd(real: Tensor, fake: Tensor, extent: float, bins: int = BINS) -> float:
    """Mean of the `published_kl` of the mixture from either."""
    p, q = density(real, extent, bins), density(fake, extent, bins)
    mixture = 0.5 * (p + q)
    return 0.5 * (_published(mixture, p) + _published(mixture, q))


def _published(p: Tensor, q: Tensor) -> float:
    return float((torch.xlogy(p, p) - p * torch.log(q + _TINY)).sum() / len(p))


def histogram_kl(real: Tensor, fake: Tensor, extent: float, bins: int = BINS) -> float:
    """KL(P || Q) in nats between the cells' probabilities of data P and model Q, the outside being one more cell.

    P is the plain histogram. Q has half a point added to every cell (Krichevsky and Trofimov), for it would be infinite
    at the first empty one: with N samples an empty cell has about 1 / (2 N + cells). The value therefore depends on
    bins and numbers of points, and has a floor above zero (`histogram_kl` of two draws of the data tells it).
    """
    p = _cells(real, extent, bins)
    q = _cells(fake, extent, bins) + PSEUDO_COUNT
    p, q = p / p.sum(), q / q.sum()
    return float((torch.xlogy(p, p) - torch.xlogy(p, q)).sum())


def histogram_jsd(real: Tensor, fake: Tensor, extent: float, bins: int = BINS) -> float:
    """Jensen-Shannon divergence in nats, [KL(P || M) + KL(Q || M)] / 2 with M = (P + Q) / 2: in [0, ln 2], symmetric.

    P and Q are plain histograms with the outside as one more cell; nothing is smoothed, since M covers both.
    """
    p, q = _cells(real, extent, bins), _cells(fake, extent, bins)
    p, q = p / p.sum(), q / q.sum()
    m = 0.5 * (p + q)
    return float(0.5 * (torch.xlogy(p, p) + torch.xlogy(q, q)).sum() - torch.xlogy(m, m).sum())


def _cells(x: Tensor, extent: float, bins: int) -> Tensor:
    inside = counts(x, extent, bins).flatten()
    outside = len(x) - inside.sum()
    return torch.cat([inside, outside[None]])


def grid(extent: float, n: int) -> Tensor:
    """(n^2, 2) float64: all points of a square grid over [-extent, extent]^2, borders included."""
    axis = torch.linspace(-extent, extent, n, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)


def energies(energy: Energy, x: Tensor, dtype: torch.dtype = torch.float32, batch: int = 8192) -> Tensor:
    """energy of many points (N, 2), `batch` at a time, which changes no result: (N,) float64."""
    with torch.no_grad():
        return torch.cat([energy(part.to(dtype)).double().cpu() for part in torch.split(x, batch)])


def gnelbo(on_points: Tensor, on_grid: Tensor) -> float:
    """The published grid-normalised ELBO: mean of n over evaluation points / sum of n over grid and these points."""
    return float(on_points.mean() / (on_grid.sum() + on_points.sum()))


def grid_nll(on_points: Tensor, on_grid: Tensor, extent: float) -> float:
    """Mean negative log likelihood in nats of points under exp(-n) normalised to integrate to 1 over the square.

    mean n(x) + log of the Riemann sum of exp(-n) over the grid: comparable between models whatever the scale at which
    their ELBO was trained to be a density, and to the entropy of the data, its least value. The grid must be finer than
    what n resolves. on_grid: n of `grid(extent, n)`.
    """
    cell = (2 * extent / (math.isqrt(len(on_grid)) - 1)) ** 2
    return float(on_points.mean() + torch.logsumexp(-on_grid, 0) + math.log(cell))


def negative_elbo(players: Players, *, beta_rec: float = 1.0, beta_kl: float = 1.0) -> Energy:
    """n(x) = beta_kl KL(q(z|x) || prior) + beta_rec |x - decoder(mu(x))|^2: (B, 2) -> (B,).

    Deterministic, and with unit weights whatever the training had, as published.
    """

    def energy(x: Tensor) -> Tensor:
        q = players.encoder(x)
        return beta_kl * terms.kl(q, players.prior) + beta_rec * terms.reconstruction(x, players.decoder(q.mu, "rec"))

    return energy

"""Sliced Wasserstein distance between two sets of pictures: a sample metric that needs no trained network.

The definition used here ("pixel SW1"): pictures larger than `size` are area-averaged down to `size` x `size`; every
picture is one vector x in R^D of pixel values; K directions theta_k are drawn uniformly from the unit sphere;

    SW1(real, fake) = 1/K sum_k W1(<theta_k, real>, <theta_k, fake>)
    W1(P, Q) = integral_0^1 |F_P^-1(t) - F_Q^-1(t)| dt      with F^-1 the quantile functions

W1 is exact for two empirical distributions, of unequal counts too. Rabin, Peyre, Delon and Bernot 2011 slice W2^2;
Karras, Aila, Laine and Lehtinen 2018 average W1, over patches of a Laplacian pyramid whose means and deviations are
normalised away per set. Whole pictures without normalisation are used here so that a wrong layout, a wrong colour and
a missing mode all count. Unit: input units, as <theta, .> of white noise of deviation s has deviation s in any D.

The value depends on D, so compare only at one `size`; and it has a floor: two finite draws of one distribution differ.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sivae_dist import counters
from sivae_dist.errors import UserError

_CHUNK = 64  # directions at a time: bounds memory at 64 * D doubles


def sliced_wasserstein(
    real: Tensor,
    fake: Tensor,
    *,
    input_range: tuple[float, float] | None = None,
    projections: int = 256,
    seed: int = 0,
    size: int | None = 64,
) -> float:
    """Pixel SW1 of two sets, (N, ...) and (M, ...) with equal trailing shape; see the module's docstring.

    input_range: clamps both sets to it and rescales to [0, 1], so that models of different ranges compare; None leaves
        the values as they are. projections: number of directions, drawn from (seed, k), the same for every call of one
        seed and D. size: 4-D sets (N, C, H, W) wider or taller are area-averaged down to it; None never does.
    Projections, sorting and sums are float64. Raises UserError for non-finite values or an empty set, ValueError for
    shapes that do not match.
    """
    if real.shape[1:] != fake.shape[1:] or real.dim() < 2:
        raise ValueError(f"sliced_wasserstein: shapes {tuple(real.shape)} and {tuple(fake.shape)} do not match")
    if projections < 1:
        raise UserError(f"sliced_wasserstein: projections is {projections}; expected at least 1", "256 is usual")
    a, b = _vectors("real", real, input_range, size), _vectors("fake", fake, input_range, size)
    key = counters.key(seed, "sliced_wasserstein")
    total = 0.0
    for start in range(0, projections, _CHUNK):
        numbers = torch.arange(start, min(start + _CHUNK, projections), device=a.device)
        directions = counters.normal(key, numbers, (a.shape[1],), torch.float64)
        directions = directions / directions.norm(dim=1, keepdim=True)
        total += float(wasserstein_1d(directions @ a.T, directions @ b.T).sum())
    return total / projections


def wasserstein_1d(a: Tensor, b: Tensor) -> Tensor:
    """Exact W1 between the empirical distributions in the rows of a (K, N) and b (K, M); (K,).

    The quantile functions are steps at i/N and j/M. In units of 1/(N M) all steps are integers, so the integral over
    their common refinement has no rounding in its limits.
    """
    n, m = a.shape[1], b.shape[1]
    steps = np.union1d(np.arange(n + 1, dtype=np.int64) * m, np.arange(m + 1, dtype=np.int64) * n)
    left = torch.from_numpy(steps[:-1]).to(a.device)
    width = torch.from_numpy(np.diff(steps) / (n * m)).to(a)
    gap = a.sort(dim=1).values[:, left // m] - b.sort(dim=1).values[:, left // n]
    return (gap.abs() * width).sum(dim=1)


def _vectors(which: str, images: Tensor, input_range: tuple[float, float] | None, size: int | None) -> Tensor:
    """(N, D) float64, checked, scaled and averaged down."""
    if len(images) == 0:
        raise UserError(f"sliced_wasserstein: the {which} set is empty", "give at least one sample in each set")
    x = images.detach().double()
    bad = int((~x.isfinite()).flatten(1).any(dim=1).sum())
    if bad:
        raise UserError(
            f"sliced_wasserstein: {bad} of {len(x)} {which} samples hold NaN or infinite values",
            "the model that made them has diverged: evaluate an earlier checkpoint",
        )
    if input_range is not None:
        low, high = input_range
        if not low < high:
            raise UserError(f"input_range is ({low}, {high}); expected low < high", "give the range of the data")
        x = (x.clamp(low, high) - low) / (high - low)
    if size is not None and x.dim() == 4 and max(x.shape[2:]) > size:
        x = torch.nn.functional.adaptive_avg_pool2d(x, (min(size, x.shape[2]), min(size, x.shape[3])))
    return x.flatten(1)

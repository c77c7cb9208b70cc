"""Ways from code to code."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["slerp", "lerp"]

NEARLY = 1e-6  # radians; closer to parallel or to opposite than this counts as such


def lerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b."""
    return torch.lerp(a, b, t)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """sin((1 - t) w) / sin w * a + sin(t w) / sin w * b, with w the angle between a and b (Shoemake 1985).

    a, b: one shape, each taken as one vector; computed in float64, returned in a's dtype. t 0 and 1 give a and b.
    Where the formula has no value: parallel vectors and a zero vector are interpolated linearly; opposite ones go round
    by way of a fixed direction at right angles (see `_aside`), their lengths interpolated linearly. (Between vectors of
    unequal lengths that are nearly opposite the formula swings far out; codes of many dimensions are never so.)
    """
    if t in (0, 1):
        return a.clone() if t == 0 else b.clone()
    start, end = a.double().flatten(), b.double().flatten()
    lengths = float(start.norm()), float(end.norm())
    if min(lengths) == 0:
        return lerp(a, b, t)
    u, v = start / lengths[0], end / lengths[1]
    angle = 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))  # acos loses half the digits near 0 and pi
    if angle < NEARLY:
        return lerp(a, b, t)
    if math.pi - angle < NEARLY:
        length = (1 - t) * lengths[0] + t * lengths[1]
        between = length * (math.cos(math.pi * t) * u + math.sin(math.pi * t) * _aside(u))
    else:
        between = (math.sin((1 - t) * angle) * start + math.sin(t * angle) * end) / math.sin(angle)
    return between.reshape(a.shape).to(a.dtype)


def walk(stations: Tensor, *, steps: int, loop: bool, kind: Kind) -> Tensor:
    """(K, *shape) -> (F, *shape): from each station to the next in `steps` steps; F is (K - 1) steps + 1.

    loop: also from the last to the first, which is not repeated: F is K steps. One station gives itself.
    Raises ValueError for steps < 1.
    """
    if steps < 1:
        raise ValueError(f"walk: steps is {steps}")
    between = slerp if kind == "slerp" else lerp
    ends = [*range(1, len(stations)), *([0] if loop and len(stations) > 1 else [])]
    frames = [between(stations[k], stations[end], i / steps) for k, end in enumerate(ends) for i in range(steps)]
    if len(ends) < len(stations):
        frames.append(stations[-1])
    return torch.stack(frames)


def _aside(u: Tensor) -> Tensor:
    """A unit vector at right angles to the unit vector u (1-D, two dimensions or more): the coordinate axis that is
    farthest from u, less its part along u. In one dimension there is none: zero, so that the way leads through zero.
    """
    axis = torch.zeros_like(u)
    axis[u.abs().argmin()] = 1
    rest = axis - (axis @ u) * u
    length = rest.norm()
    return rest / length if float(length) > NEARLY else torch.zeros_like(u)

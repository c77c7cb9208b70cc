"""What the operators share: reading their arguments, and the type and layout of their results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = int | Sequence[int]


def pair(value: Pair, name: str) -> tuple[int, int]:
    """A factor as (x, y), both 1 or more. Raises ValueError for anything else."""
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or not all(isinstance(v, int) and v >= 1 for v in both):
        raise ValueError(f"{name} is {value}, expected an integer or (x, y), 1 or more")
    return both[0], both[1]


def four(value: Pair, name: str = "padding") -> tuple[int, int, int, int]:
    """Padding as (x before, x after, y before, y after); negative crops. Raises ValueError for anything else."""
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if len(sides) == 2:
        sides = (sides[0], sides[0], sides[1], sides[1])
    if len(sides) != 4 or not all(isinstance(v, int) for v in sides):
        raise ValueError(
            f"{name} is {value}, expected an integer, (x, y) or (x_before, x_after, y_before, y_after), integers"
        )
    return sides[0], sides[1], sides[2], sides[3]


def check_map(x: Tensor, name: str = "x") -> None:
    """Raises ValueError unless x is a floating (B, C, H, W)."""
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype} of shape {tuple(x.shape)}, expected a floating (B, C, H, W)")


def check_filter(f: Tensor | None, name: str = "f") -> None:
    """Raises ValueError unless f is None or floating taps with one or two dimensions."""
    if f is not None and (f.ndim not in (1, 2) or not f.is_floating_point() or not f.numel()):
        raise ValueError(
            f"{name} is {f.dtype} of shape {tuple(f.shape)}, expected None or floating (taps,) or (height, width)"
        )


def filter_size(f: Tensor | None) -> tuple[int, int]:
    """(width, height) of a filter: (1, 1) for None, both the length for one dimension."""
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


def wide(x: Tensor) -> Tensor:
    """At least float32: what the references compute in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layout(x: Tensor) -> torch.memory_format:
    """channels_last where x is laid out so and not contiguous as well, else contiguous: the layout of results."""
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def finish(y: Tensor, like: Tensor) -> Tensor:
    """y in the dtype and the layout of `like`."""
    return y.to(like.dtype).contiguous(memory_format=layout(like))

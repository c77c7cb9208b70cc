"""What the epilogue of a modulated layer is compared on, by every build of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lanes import close, drawn
from torch import Tensor

from sivae_dist.ops import setup_filter
from sivae_dist.ops.modulated_layer import epilogue_reference
from sivae_dist.ops.upfirdn2d import upfirdn2d_reference

SHAPES = [(2, 8, 4, 8), (3, 70, 5, 7), (1, 8, 70, 64), (2, 3, 1, 1)]
# (noise maps, bias, a scaled map, the map itself, clamp)
FORMS = [(2, True, True, True, 1.5), (1, True, False, True, None), (0, False, True, False, 1.0)]
ALPHA, GAIN = 0.2, 2.0**0.5

# With the filter before it: more rows and columns than a piece of the work has, maps smaller than the filter.
FIR_SHAPES = [(2, 8, 4, 9), (2, 35, 5, 6), (1, 2, 165, 3), (1, 3, 3, 540), (2, 3, 1, 1)]
# (taps, padding, flip, gain): as in the layer; a product and none, every padding that the operator takes.
FIRS = [
    (setup_filter([1, 3, 3, 1]), (1, 1, 1, 1), False, 4.0),
    (drawn(4, 4, seed=11), (3, 0, 2, 3), True, 0.7),
    (drawn(4, seed=12), (0, 3, 3, 1), False, 1.0),
    (drawn(4, 4, seed=13), (2, 3, 3, 3), False, 1.3),
]


def fitting(shape: tuple[int, ...], pads: tuple[int, ...]) -> bool:
    return shape[3] + pads[0] + pads[1] >= 4 and shape[2] + pads[2] + pads[3] >= 4


def filtered(x: Tensor, fir: Any) -> Tensor:
    f, pads, flip, gain = fir
    return upfirdn2d_reference(x, f.to(x.device), 1, 1, pads, flip, gain)


def compare(
    call: Callable[..., Any],
    x: Tensor,
    form: Any,
    layout: Any,
    device: str = "cpu",
    *,
    noise_too: bool = True,
    fir: Any = None,
) -> None:
    """Values, gradients (noise_too: of noise as well), type and layout, against the reference in float64.

    fir: the filter that `call` applies first.
    """
    maps, with_bias, with_scaled, plain, clamp = form
    batch, channels, height, width = x.shape if fir is None else filtered(x.double(), fir).shape
    dtype = x.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    made = {
        "scale": drawn(batch, channels, seed=1),
        "noise": drawn(batch if maps == 2 else 1, 1, height, width, seed=2) if maps else None,
        "strength": drawn(1, seed=3).reshape(()) if maps else None,
        "bias": drawn(channels, seed=4) if with_bias else None,
        "following": drawn(batch, channels, seed=5) if with_scaled else None,
    }
    sides = [None if t is None else t.to(device, wide).requires_grad_() for t in made.values()]
    if sides[1] is not None:
        sides[1].requires_grad_(noise_too)
    twins = [None if t is None else t.detach().double().requires_grad_() for t in sides]
    leaf, twin = x.detach().clone().requires_grad_(), x.double().requires_grad_()
    found = call(leaf, *sides, ALPHA, GAIN, clamp, plain)
    wanted = epilogue_reference(twin if fir is None else filtered(twin, fir), *twins, clamp, plain=plain)
    assert [t is None for t in found] == [t is None for t in wanted] == [not plain, not with_scaled]
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if a is not None]
    weights = [drawn(*a.shape, seed=7 + k).to(device, dtype) for k, (a, _) in enumerate(pairs)]
    for a, b in pairs:
        close(a, b.detach())
        assert a.dtype == dtype
        assert a.is_contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else layout)
    names = ["x", *made]
    ours, theirs = [leaf, *sides], [twin, *twins]
    kept = [k for k, t in enumerate(ours) if t is not None and (noise_too or names[k] != "noise")]
    one = torch.autograd.grad([a for a, _ in pairs], [ours[k] for k in kept], weights)
    two = torch.autograd.grad([b for _, b in pairs], [theirs[k] for k in kept], [w.double() for w in weights])
    for k, a, b in zip(kept, one, two, strict=True):
        assert a.shape == b.shape
        # Sums of rounded numbers over a map; noise's is over what was rounded to the map's type and divided by scale.
        slack = 200.0 if names[k] == "noise" else 2.0
        close(a.to(dtype), b, slack * max(1.0, float(b.abs().max())))

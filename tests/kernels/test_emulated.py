"""The CUDA kernels themselves, run thread by thread on the CPU (kernels/common/emulate.h), against the reference.

This covers their indices, tiles, shared memory, barriers and the choice of a kernel, without a GPU. Not speed, and not
what needs real parallelism.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from lanes import DTYPES, LAYOUTS, close, drawn
from torch import Tensor

from sivae_dist.ops import _arguments, _library, kernels, setup_filter
from sivae_dist.ops._fused_bias_act import ACTS, source
from sivae_dist.ops._fused_upfirdn2d import transposed
from sivae_dist.ops.bias_act import bias_act_reference
from sivae_dist.ops.upfirdn2d import upfirdn2d_reference

pytestmark = pytest.mark.slow

SMOOTH = setup_filter([1, 3, 3, 1])
FOUR, RANDOM, WIDE = drawn(4, seed=1), drawn(4, 4, seed=2), drawn(3, 5, seed=3)
FACTORS = [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (2, 2)), ((2, 1), (1, 3)), ((2, 2), (2, 2))]
FAST = FACTORS[:3]


@pytest.fixture(scope="module")
def ops() -> Any:
    kernels.load("emulated")
    _library.define_emulated()
    return torch.ops.sivae_emulated


def upfirdn2d(ops: Any, x: Tensor, f: Tensor | None, up: Any, down: Any, pads: Any, flip: bool = False) -> Tensor:
    f = (
        None
        if f is None
        else f.to(torch.promote_types(x.dtype, torch.float32) if x.dtype.itemsize == 8 else torch.float32)
    )
    found: Tensor = ops.upfirdn2d(x, f, *up, *down, *pads, flip, 1.3)
    close(found, upfirdn2d_reference(x.double(), f, up, down, pads, flip, 1.3))
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("up", "down"), FAST)
def test_upfirdn2d_fast_paths(ops: Any, dtype: torch.dtype, layout: Any, up: Any, down: Any) -> None:
    """Whole and broken packs; parities and alignments of the padding; maps wider than a tile; several maps a block."""
    shapes = [(1, 8, 5, 8), (2, 8, 3, 16), (1, 2, 4, 150), (2, 3, 7, 9), (1, 8, 40, 3)]
    sides = [(2, 1), (1, 2), (0, 3), (-1, 5)]
    for shape, (left, top), f in itertools.product(shapes, sides, (SMOOTH, FOUR)):
        if shape[3] > 100 and left != 1:
            continue
        x = drawn(*shape).to(dtype).contiguous(memory_format=layout)
        upfirdn2d(ops, x, f, up, down, (left, 3, top, 2), flip=left == 2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize(("up", "down"), FACTORS)
def test_upfirdn2d_other_paths(ops: Any, layout: Any, up: Any, down: Any) -> None:
    for dtype, f in itertools.product((torch.float32, torch.bfloat16), (None, RANDOM, WIDE, drawn(8))):
        x = drawn(2, 8, 6, 9).to(dtype).contiguous(memory_format=layout)
        upfirdn2d(ops, x, f, up, down, (5, 3, 4, 6), flip=True)


@pytest.mark.parametrize(("up", "down"), FAST)
def test_upfirdn2d_not_finite_and_repeats(ops: Any, up: Any, down: Any) -> None:
    for layout, value in itertools.product(LAYOUTS, (float("nan"), float("inf"))):
        x = drawn(1, 8, 9, 8).float().contiguous(memory_format=layout)
        x[0, 1, 4, 3] = x[0, 2, 0, 0] = x[0, 3, 8, 7] = value
        found, again = (ops.upfirdn2d(x, SMOOTH, *up, *down, 2, 1, 2, 1, False, 1.0) for _ in range(2))
        wanted = upfirdn2d_reference(x.double(), SMOOTH, up, down, (2, 1, 2, 1))
        assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.isinf(), wanted.isinf())
        assert torch.equal(found.nan_to_num(), again.nan_to_num())


@pytest.mark.parametrize(("up", "down"), FAST)
def test_upfirdn2d_derivative(ops: Any, up: Any, down: Any) -> None:
    for layout in LAYOUTS:
        x = drawn(1, 8, 6, 10).float().contiguous(memory_format=layout).requires_grad_()
        y = upfirdn2d_reference(x, SMOOTH, up, down, (2, 1, 1, 2))
        gradient = drawn(*y.shape, seed=6).float().contiguous(memory_format=layout)
        (wanted,) = torch.autograd.grad(y, x, gradient)
        pads = transposed((10, 6), (y.shape[3], y.shape[2]), (4, 4), up, down, (2, 1, 1, 2))
        close(ops.upfirdn2d_backward(gradient, SMOOTH, *down, *up, *pads, True, 1.0), wanted)


def check_bias_act(ops: Any, x: Tensor, act: str, alpha: float, clamp: float, bias: bool, noise: str) -> None:
    """Forward and backward against autograd through the reference in float64."""
    wide = _library.wide_dtype(x)
    b = drawn(x.shape[1], seed=1).to(wide) if bias else None
    n = s = None
    if noise != "none":
        n = drawn(1 if noise == "shared" else x.shape[0], 1, *x.shape[2:], seed=2).to(wide)
        s = torch.tensor(0.7, dtype=wide)
    number, gain = ACTS.index(act), 1.3
    y = ops.bias_act(x, b, n, s, number, alpha, gain, clamp)
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, b, n, s)]
    wanted = bias_act_reference(*leaves, act, alpha, gain, None if clamp < 0 else clamp)
    close(y, wanted.detach())
    g = drawn(*x.shape, seed=3).to(x.dtype).contiguous(memory_format=_arguments.layout(x))
    taken = source(act, alpha, gain, clamp)
    saved = {"nothing": None, "output": y, "input": x}[taken]
    arguments = (number, alpha, gain, clamp, taken == "output", bias, noise != "none")
    found = ops.bias_act_backward(g, saved, b, n, s, *arguments)
    kept = [t for t in (leaves[0], leaves[1], leaves[3]) if t is not None]
    exact = iter(torch.autograd.grad(wanted, kept, g.double()))
    for gradient, leaf in zip(found, (leaves[0], leaves[1], leaves[3]), strict=True):
        if leaf is not None:
            value = next(exact)
            # Sums of many terms are compared in units of what they add up to at most, not of what cancelling leaves.
            close(gradient, value, size=None if leaf is leaves[0] else g.double().abs().sum().item() ** 0.5 * 10)
    again = ops.bias_act_backward(g, saved, b, n, s, *arguments)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("memory", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_act(ops: Any, dtype: torch.dtype, memory: Any) -> None:
    """Whole and broken packs, planes of one piece and of several, more channels than a block is wide."""
    shapes = [(2, 16, 4, 4), (3, 5, 3, 3), (1, 2, 50, 100), (1, 264, 3, 8)]
    for shape, act in itertools.product(shapes, ("lrelu", "relu", "linear", "swish")):
        x = drawn(*shape).to(dtype).contiguous(memory_format=memory)
        check_bias_act(ops, x, act, 0.2, -1.0, True, "each")


@pytest.mark.parametrize("act", ACTS)
def test_bias_act_arguments(ops: Any, act: str) -> None:
    for bias, noise, clamp, memory in itertools.product((False, True), ("none", "shared"), (-1.0, 0.9), LAYOUTS):
        x = drawn(2, 8, 3, 4).float().contiguous(memory_format=memory)
        check_bias_act(ops, x, act, -0.3 if act == "lrelu" and bias else 0.2, clamp, bias, noise)


def test_empty(ops: Any) -> None:
    x = torch.ones(0, 3, 4, 4)
    assert ops.upfirdn2d(x, SMOOTH, 2, 2, 1, 1, 2, 1, 2, 1, False, 1.0).shape == (0, 3, 8, 8)
    b, n, s = torch.ones(3), torch.ones(1, 1, 4, 4), torch.tensor(1.0)
    assert ops.bias_act(x, b, n, s, 2, 0.2, 1.0, -1.0).shape == x.shape
    dx, db, ds = ops.bias_act_backward(x, x, b, n, s, 2, 0.2, 1.0, -1.0, True, True, True)
    assert dx.shape == x.shape and torch.equal(db, torch.zeros(3)) and ds == 0

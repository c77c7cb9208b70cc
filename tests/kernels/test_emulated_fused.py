"""The CUDA kernels of the fused blocks, run thread by thread on the CPU, against the reference.

See test_emulated.py for what that covers and what it does not.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from lanes import DTYPES, LAYOUTS, close, drawn
from modulated_cases import FIR_SHAPES, FIRS, FORMS
from modulated_cases import SHAPES as EPILOGUE_SHAPES
from modulated_cases import compare as compare_epilogue
from modulated_cases import fitting as fits_filter
from norm_cases import KINDS, compare, fitting
from norm_cases import SHAPES as MAPS
from torch import Tensor

from sivae_dist.ops import _arguments, _fused_norm_act, _library, kernels
from sivae_dist.ops.adain_act import adain_act_reference

pytestmark = pytest.mark.slow  # building takes most of a minute

# Whole and broken packs, more pixels than a block takes at once, maps smaller than a warp, several groups of channels.
SHAPES = [(2, 8, 4, 8), (1, 24, 3, 5), (2, 3, 40, 33), (1, 8, 72, 64), (1, 70, 2, 2), (3, 1, 1, 1), (0, 4, 2, 2)]


@pytest.fixture(scope="module")
def ops() -> Any:
    kernels.load("emulated")
    _library.define_emulated()
    return torch.ops.sivae_emulated


def agree(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        size = max(1.0, float(other.detach().abs().max()) if other.numel() else 1.0)
        close(one.to(dtype) if one.dtype == torch.float32 else one, other, 2 * size)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adain_act(ops: Any, dtype: torch.dtype, layout: Any) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in SHAPES:
        batch, channels, height, width = shape
        x = drawn(*shape).to(dtype).contiguous(memory_format=layout)
        for plain in (False, True):
            side = {
                "noise": drawn(batch, 1, height, width, seed=1),
                "noise_strength": drawn(channels, seed=2),
                "bias": drawn(channels, seed=3),
                "style": drawn(batch, 2 * channels, seed=4),
            }
            given = [None if plain and k != "bias" else v.to(wide) for k, v in side.items()]
            leaves = [x.double().requires_grad_(), *(t if t is None else t.double().requires_grad_() for t in given)]
            found = ops.adain_act(x, *given, 1e-3, 0.2)
            wanted = adain_act_reference(*leaves, eps=1e-3)
            agree(found, wanted, dtype)
            assert found[0].is_contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else layout)

            weights = [drawn(*t.shape, seed=5 + k).to(t.dtype) for k, t in enumerate(found)]
            weights[0] = weights[0].contiguous(memory_format=layout)
            results = ops.adain_act_backward(weights[0], x, *given, *found[1:], *weights[1:], 1e-3, 0.2)
            used = [leaf for k, leaf in enumerate(leaves) if leaf is not None and k != 1]
            gradients = torch.autograd.grad(wanted, used, [w.double() for w in weights])
            dx, dstrength, dbias, dstyle = results
            agree((dx, dbias) if plain else (dx, dstrength, dbias, dstyle), gradients, dtype)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
def test_adain_act_not_finite_and_repeats(ops: Any, layout: Any) -> None:
    for value in (float("nan"), float("inf")):
        x = drawn(2, 8, 72, 64).float().contiguous(memory_format=layout)
        x[1, 3, 70, 5] = value
        none = [None] * 4
        found, again = (ops.adain_act(x, *none, 1e-8, 0.2) for _ in range(2))
        for one, two, other in zip(found, again, adain_act_reference(x.double()), strict=True):
            assert torch.equal(one.isnan(), other.isnan()) and torch.equal(one.isinf(), other.isinf())
            assert torch.equal(one.nan_to_num(), two.nan_to_num())


def test_adain_act_far_from_zero(ops: Any) -> None:
    for layout in LAYOUTS:
        x = (drawn(2, 4, 72, 64) + 3e3).float().contiguous(memory_format=layout)
        std, wanted = ops.adain_act(x, None, None, None, None, 1e-8, 0.2)[2], adain_act_reference(x.double())[2]
        assert float((std.double() - wanted).abs().max()) < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_act(ops: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, layout: Any) -> None:
    monkeypatch.setattr(_fused_norm_act, "_operators", lambda: ops)
    for number, (shape, where, resample) in enumerate(fitting(MAPS)):
        kind = KINDS[number % len(KINDS)]
        if dtype in (torch.float32, torch.bfloat16) or number % 4 == 0:
            x = drawn(*shape).to(dtype).contiguous(memory_format=layout)
            compare(_fused_norm_act.fused_norm_act, x, kind, where, resample, layout)


def epilogue(ops: Any, name: str, *before: Any) -> Any:
    """The operator of that name with its backward one, called as `fused_epilogue`. before: arguments after x."""

    class Emulated(torch.autograd.Function):
        """What registration does for the real operator."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, *arguments: Any) -> Any:
            ctx.given, ctx.sides, ctx.layout = (x, *before, *arguments[:-1]), arguments[:5], _arguments.layout(x)
            return getattr(ops, name)(x, *before, *arguments)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            there = [g.contiguous(memory_format=ctx.layout) if g.numel() else None for g in gradients]
            dx, *sums = getattr(ops, f"{name}_backward")(*there, *ctx.given)
            dscale, dbias, dstrength, dnext = sums
            noise = None if ctx.sides[1] is None else torch.zeros_like(ctx.sides[1])
            found = (dscale, noise, dstrength, dbias, dnext)
            kept = (None if side is None else g for g, side in zip(found, ctx.sides, strict=True))
            return dx, *kept, None, None, None, None

    def call(x: Tensor, scale: Tensor, noise: Any, strength: Any, bias: Any, following: Any, *rest: Any) -> Any:
        alpha, gain, clamp, plain = rest
        bound = -1.0 if clamp is None else clamp
        y, scaled = Emulated.apply(x, scale, noise, strength, bias, following, alpha, gain, bound, plain)
        return y if plain else None, None if following is None else scaled

    return call


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_modulated_epilogue(ops: Any, dtype: torch.dtype, layout: Any) -> None:
    call = epilogue(ops, "modulated_epilogue")
    for shape, form in itertools.product(EPILOGUE_SHAPES, FORMS):
        x = drawn(*shape).to(dtype).contiguous(memory_format=layout)
        compare_epilogue(call, x, form, layout, noise_too=False)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_modulated_fir_epilogue(ops: Any, dtype: torch.dtype, layout: Any) -> None:
    """Whole and broken packs, several strips and bands of a map, fewer channels than lanes and more."""
    for number, (shape, fir) in enumerate(itertools.product(FIR_SHAPES, FIRS)):
        f, pads, flip, gain = fir
        if fits_filter(shape, pads):
            x = drawn(*shape).to(dtype).contiguous(memory_format=layout)
            taps = f.to(torch.float64 if dtype == torch.float64 else torch.float32)
            taps = torch.outer(taps, taps) if taps.ndim == 1 else taps
            call = epilogue(ops, "modulated_fir_epilogue", taps, *pads, flip, gain)
            compare_epilogue(call, x, FORMS[number % len(FORMS)], layout, noise_too=False, fir=fir)


def test_modulated_fir_epilogue_repeats(ops: Any) -> None:
    f, pads, flip, gain = FIRS[0]
    for layout in LAYOUTS:
        x = drawn(2, 9, 35, 70).float().contiguous(memory_format=layout)
        sides = (drawn(2, 9).float(), None, None, drawn(9).float(), None)
        given = (x, f, *pads, flip, gain, *sides, 0.2, 1.4, -1.0)
        y = ops.modulated_fir_epilogue(*given, True)[0]
        assert torch.equal(y, ops.modulated_fir_epilogue(*given, True)[0])
        one, two = (ops.modulated_fir_epilogue_backward(y, None, *given) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

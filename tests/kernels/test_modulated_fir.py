"""FIR and epilogue in one pass equal one after the other, by the reference in float64: values and gradients."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from typing import Any

import pytest
import torch
from lanes import DTYPES, LANES, LAYOUTS, Lane, close, drawn
from modulated_cases import FIR_SHAPES, FIRS, FORMS, compare, fitting
from torch import Tensor

from sivae_dist.errors import UserError
from sivae_dist.ops import kernels, modulated_layer, setup_filter
from sivae_dist.ops._fused_modulated_fir import fused_fir_epilogue, serves_filter
from sivae_dist.ops.upfirdn2d import upfirdn2d_reference

pytestmark = pytest.mark.parametrize("lane", LANES, indirect=True)

ONES = (1, 1, 1, 1)


def with_filter(fir: Any, x: Tensor, *rest: Any) -> Any:
    f, pads, flip, gain = fir
    return fused_fir_epilogue(x, f.to(x.device), pads, flip, gain, *rest)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass_equals_two(lane: Lane, dtype: torch.dtype, layout: Any) -> None:
    for number, (shape, fir) in enumerate(itertools.product(FIR_SHAPES, FIRS)):
        if fitting(shape, fir[1]):
            x, form = lane.put(drawn(*shape), dtype, layout), FORMS[number % len(FORMS)]
            compare(functools.partial(with_filter, fir), x, form, layout, lane.device, noise_too=False, fir=fir)


def test_the_gradient_of_the_noise(lane: Lane) -> None:
    for form in FORMS[:2]:
        x = lane.put(drawn(2, 8, 4, 9), torch.float32)
        call = functools.partial(with_filter, FIRS[1])
        compare(call, x, form, torch.contiguous_format, lane.device, fir=FIRS[1])


def test_the_layer_uses_it_where_it_can(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """With four taps; with other filters, and without, the filter is a pass of its own and the result as right."""
    calls: list[Any] = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return fused_fir_epilogue(*arguments)

    # The function of the same name hides the module from a path of attributes.
    monkeypatch.setattr(importlib.import_module("sivae_dist.ops.modulated_layer"), "fused_fir_epilogue", counted)
    x, weight, styles = (lane.put(drawn(*s, seed=k)) for k, s in enumerate([(2, 4, 5, 6), (8, 4, 3, 3), (2, 4)]))
    taps: list[tuple[Any, int]] = [([1, 3, 3, 1], 1), ([1, 2, 1], 0), (None, 0)]
    for number, (each, times) in enumerate(taps):
        f = None if each is None else setup_filter(each).double().to(lane.device)
        calls.clear()
        y, _ = modulated_layer(x, weight, styles, up=2, padding=1, resample_filter=f)
        with kernels.using("reference"):
            wanted, _ = modulated_layer(x, weight, styles, up=2, padding=1, resample_filter=f)
        assert len(calls) == times and y is not None and wanted is not None, number
        torch.testing.assert_close(y, wanted, rtol=1e-11, atol=1e-11)


def test_gradcheck(lane: Lane) -> None:
    given = {
        "x": drawn(2, 3, 4, 5),
        "scale": drawn(2, 3, seed=1),
        "noise": drawn(2, 1, 3, 4, seed=2),
        "strength": drawn(1, seed=3).reshape(()),
        "bias": drawn(3, seed=4),
        "following": drawn(2, 3, seed=5),
    }
    tensors = [lane.put(t).requires_grad_() for t in given.values()]
    for fir in (FIRS[0], FIRS[1]):
        f, _, flip, gain = fir

        def run(*leaves: Tensor, f: Tensor = f, flip: bool = flip, gain: float = gain) -> Any:
            return fused_fir_epilogue(leaves[0], f.to(lane.device), ONES, flip, gain, *leaves[1:], 0.2, 1.4, 1.5, True)

        assert torch.autograd.gradcheck(run, tuple(tensors))


def test_empty_batch(lane: Lane) -> None:
    for layout in LAYOUTS:
        x = lane.put(drawn(0, 4, 3, 3), torch.float32, layout).requires_grad_()
        scale, bias = lane.put(drawn(0, 4), torch.float32), lane.put(drawn(4), torch.float32).requires_grad_()
        y, scaled = fused_fir_epilogue(
            x, FIRS[0][0].to(lane.device), ONES, False, 1.0, scale, None, None, bias, scale, 0.2, 1.0, None, True
        )
        assert y is not None and scaled is not None and y.shape == scaled.shape == (0, 4, 2, 2)
        gradients = torch.autograd.grad(y.sum() + scaled.sum(), [x, bias])
        assert gradients[0].shape == x.shape and torch.equal(gradients[1], torch.zeros_like(bias))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_goes_where_the_taps_go(lane: Lane, value: float) -> None:
    for layout, clamp, fir in itertools.product(LAYOUTS, (None, 2.0), FIRS[:2]):
        f, _, flip, _ = fir
        x = lane.put(drawn(2, 8, 6, 9), torch.float32, layout)
        x[1, 2, 3, 1] = x[0, 1, 0, 0] = value
        one = lane.put(torch.ones(2, 8))
        y, _ = fused_fir_epilogue(
            x, f.to(lane.device), ONES, flip, 1.0, one, None, None, None, None, 0.2, 1.4, clamp, True
        )
        u = upfirdn2d_reference(x, f.to(lane.device), 1, 1, ONES, flip)
        assert y is not None
        if math.isnan(value):
            assert torch.equal(y.isnan(), u.isnan())
        else:
            assert torch.equal(y.isinf(), u.isinf() if clamp is None else torch.zeros_like(u, dtype=torch.bool))


def test_reruns_a_second_derivative_and_opcheck(lane: Lane) -> None:
    f = FIRS[0][0].to(lane.device)
    for layout, following in itertools.product(LAYOUTS, (True, False)):
        x = lane.put(drawn(2, 8, 163, 5), torch.float32, layout).requires_grad_()
        one = lane.put(drawn(2, 8, seed=1), torch.float32)
        noise = lane.put(drawn(2, 1, 162, 4, seed=2), torch.float32)
        sides = [noise, one.new_tensor(0.3)] if following else [None, None]
        given = (x, f, *ONES, False, 4.0, one, *sides, one[0].clone(), one if following else None, 0.2, 1.4, 2.0)

        def run(given: Any = given, both: bool = following) -> list[Tensor]:
            results = [t for t in lane.ops.modulated_fir_epilogue(*given, both) if t.numel()]
            return [*results, torch.autograd.grad([t.square().sum() for t in results], given[0])[0]]

        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
        if not following and layout == torch.contiguous_format:
            continue  # it takes a second each time
        torch.library.opcheck(lane.ops.modulated_fir_epilogue.default, (*given, following))
        y, scaled = (t.detach() for t in lane.ops.modulated_fir_epilogue(*given, following))
        arguments = (y, scaled if following else None, x.detach(), *given[1:])
        torch.library.opcheck(lane.ops.modulated_fir_epilogue_backward.default, arguments)
        y = lane.ops.modulated_fir_epilogue(*given, following)[0]
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(UserError, match="second derivative"):
            gradient.sum().backward()


def test_no_graph_break(lane: Lane) -> None:
    f = setup_filter([1, 3, 3, 1]).to(lane.device)
    weight, styles = (lane.put(drawn(*s, seed=k), torch.float32) for k, s in enumerate([(8, 4, 3, 3), (2, 4)]))

    def loss(x: Tensor) -> Tensor:
        y, _ = modulated_layer(x.sin(), weight, styles, up=2, padding=1, resample_filter=f)
        assert y is not None
        return y.square().sum()

    x = lane.put(drawn(2, 4, 5, 6, seed=3), torch.float32).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, wanted = torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x)
    close(found[0], wanted[0].double(), 4 * float(wanted[0].abs().max()))


def test_filters_that_it_does_not_know(lane: Lane) -> None:
    four = setup_filter([1, 3, 3, 1])
    assert serves_filter(four, ONES) and serves_filter(four[0], (0, 3, 3, 0))
    assert not serves_filter(four, (4, 0, 0, 0)) and not serves_filter(four, (-1, 1, 1, 1))
    assert not serves_filter(None, ONES) and not serves_filter(four[:3], ONES)
    with pytest.raises(RuntimeError, match="4 x 4 taps"):
        lane.ops.modulated_fir_epilogue(
            lane.put(drawn(1, 2, 5, 5)), lane.put(drawn(3, 3)), *ONES, False, 1.0, lane.put(drawn(1, 2)),
            None, None, None, None, 0.2, 1.0, -1.0, True,
        )  # fmt: skip

"""The epilogue of a modulated layer by the kernels equals the reference in float64; whole layers equal their parts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from lanes import DTYPES, LANES, LAYOUTS, Lane, close, drawn
from modulated_cases import FORMS, SHAPES, compare
from torch import Tensor

from sivae_dist.errors import UserError
from sivae_dist.ops import bias_act, kernels, modulated_conv2d, modulated_layer, setup_filter
from sivae_dist.ops._fused_modulated import fused_epilogue
from sivae_dist.ops.modulated_layer import following_factor

pytestmark = pytest.mark.parametrize("lane", LANES, indirect=True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogue_equals_the_reference(lane: Lane, dtype: torch.dtype, layout: Any) -> None:
    for shape, form in itertools.product(SHAPES, FORMS):
        compare(fused_epilogue, lane.put(drawn(*shape), dtype, layout), form, layout, lane.device)


def inputs(lane: Lane, up: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    size = (5 * up, 6 * up)
    made = {
        "x": drawn(3, 4, 5, 6),
        "weight": drawn(8, 4, 3, 3, seed=1),
        "styles": drawn(3, 4, seed=2),
        "bias": drawn(8, seed=3),
        "noise_strength": drawn(1, seed=4).reshape(()),
        "next_styles": drawn(3, 8, seed=5),
        "noise": drawn(3, 1, *size, seed=6),
    }
    return {name: lane.put(value, dtype) for name, value in made.items()}


def in_parts(given: dict[str, Tensor], up: int, fir: Tensor | None) -> tuple[Tensor, Tensor]:
    """The layer by the operators it is made of, and the input of the next convolution."""
    x, weight, styles = given["x"], given["weight"], given["styles"]
    y = modulated_conv2d(x, weight, styles, None, up, 1, 1, fir)
    y = bias_act(y, given["bias"], given["noise"], given["noise_strength"], clamp=1.5)
    return y, y * following_factor(given["next_styles"])[:, :, None, None].to(y.dtype)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("up", [1, 2])
def test_a_layer_equals_its_parts(lane: Lane, up: int, plain: bool) -> None:
    """Values and gradients of all that is learnt, with the FIR of the transposed convolution where there is one."""
    fir = setup_filter([1, 3, 3, 1]).double().to(lane.device) if up > 1 else None
    given, other = inputs(lane, up), inputs(lane, up)
    learnt = [name for name in given if name != "noise"]
    for each in (given, other):
        for name in learnt:
            each[name].requires_grad_()
    found = modulated_layer(**given, up=up, padding=1, resample_filter=fir, clamp=1.5, plain=plain)
    with kernels.using("reference"):
        wanted = in_parts(other, up, fir)
        weights = [lane.put(drawn(*t.shape, seed=9 + k)) for k, t in enumerate(wanted)]
    pairs = [(a, b, w) for a, b, w in zip(found, wanted, weights, strict=True) if a is not None]
    assert len(pairs) == 1 + plain
    for a, b, _ in pairs:
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    ours = torch.autograd.grad([a for a, _, _ in pairs], [given[n] for n in learnt], [w for *_, w in pairs])
    theirs = torch.autograd.grad([b for _, b, _ in pairs], [other[n] for n in learnt], [w for *_, w in pairs])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_two_layers_that_hand_on_a_scaled_map(lane: Lane) -> None:
    given = inputs(lane)
    second = lane.put(drawn(5, 8, 3, 3, seed=7))
    _, scaled = modulated_layer(**given, padding=1, plain=False)
    assert scaled is not None
    found, _ = modulated_layer(scaled, second, given["next_styles"], padding=1, scaled=True)
    with kernels.using("reference"):
        y = modulated_conv2d(given["x"], given["weight"], given["styles"], padding=1)
        y = bias_act(y, given["bias"], given["noise"], given["noise_strength"])
        wanted = bias_act(modulated_conv2d(y, second, given["next_styles"], padding=1))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_gradcheck(lane: Lane) -> None:
    """Not of the next styles: what is scaled by their largest one counts that as a constant, which cancels later."""
    following = inputs(lane)["next_styles"]
    given = {name: t.requires_grad_() for name, t in inputs(lane).items() if name != "next_styles"}

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(given, tensors, strict=True))
        y, scaled = modulated_layer(**named, padding=1, clamp=1.5, next_styles=following)
        assert y is not None and scaled is not None
        return y, scaled

    # gradcheck wants equal gradients of equal calls; those of cuDNN's convolutions may differ in the last bit.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        assert torch.autograd.gradcheck(run, tuple(given.values()))


def test_empty_batch(lane: Lane) -> None:
    scale, bias = lane.put(drawn(0, 4), torch.float32), lane.put(drawn(4), torch.float32).requires_grad_()
    x = lane.put(drawn(0, 4, 3, 3), torch.float32).requires_grad_()
    y, scaled = fused_epilogue(x, scale, None, None, bias, scale, 0.2, 1.0, None, True)
    assert y is not None and scaled is not None and y.shape == scaled.shape == x.shape
    (gradient,) = torch.autograd.grad(y.sum() + scaled.sum(), bias)
    assert torch.equal(gradient, torch.zeros_like(bias))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_is(lane: Lane, value: float) -> None:
    """Infinity is clamped if there is a clamp, as the reference does; NaN is not."""
    for layout, clamp in itertools.product(LAYOUTS, (None, 2.0)):
        x = lane.put(drawn(2, 8, 5, 4), torch.float32, layout)
        x[1, 2, 3, 1] = value
        one = lane.put(drawn(2, 8).abs() + 0.1, torch.float32)
        y, scaled = fused_epilogue(x, one, None, None, None, one, 0.2, 1.4, clamp, True)
        assert y is not None and scaled is not None
        for result in (y, scaled):
            assert result.isfinite().sum() == result.numel() - (clamp is None or math.isnan(value))


def test_reruns_a_second_derivative_and_opcheck(lane: Lane) -> None:
    for layout, (noise, following, both) in itertools.product(LAYOUTS, ((True, True, True), (False, False, False))):
        x = lane.put(drawn(2, 8, 66, 64), torch.float32, layout).requires_grad_()
        one = lane.put(drawn(2, 8, seed=1), torch.float32)
        sides = [lane.put(drawn(2, 1, 66, 64, seed=2), torch.float32), one.new_tensor(0.3)] if noise else [None, None]
        given = (x, one, *sides, one[0].clone(), one if following else None, 0.2, 1.4, 2.0)

        def run(given: Any = given, both: bool = both) -> list[Tensor]:
            results = [t for t in lane.ops.modulated_epilogue(*given, both) if t.numel()]
            return [*results, torch.autograd.grad([t.square().sum() for t in results], given[0])[0]]

        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
        torch.library.opcheck(lane.ops.modulated_epilogue.default, (*given, both))
        y, scaled = (t.detach() for t in lane.ops.modulated_epilogue(*given, both))
        arguments = (y, scaled if following else None, x.detach(), *given[1:])
        torch.library.opcheck(lane.ops.modulated_epilogue_backward.default, arguments)
        y = lane.ops.modulated_epilogue(*given, both)[0]
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(UserError, match="second derivative"):
            gradient.sum().backward()


def test_no_graph_break(lane: Lane) -> None:
    given = inputs(lane, dtype=torch.float32)

    def loss(x: Tensor) -> Tensor:
        y, scaled = modulated_layer(**{**given, "x": x.sin()}, padding=1)
        assert y is not None and scaled is not None
        return y.square().sum() + scaled.sum()

    x = given["x"].clone().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, wanted = torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x)
    close(found[0], wanted[0].double(), 4 * float(wanted[0].abs().max()))


def test_bad_arguments(lane: Lane) -> None:
    given = inputs(lane)
    for name, value in (("styles", given["bias"]), ("next_styles", given["styles"]), ("noise", given["x"])):
        with pytest.raises(ValueError, match=name):
            modulated_layer(**{**given, name: value}, padding=1)
    with pytest.raises(ValueError, match="neither"):
        modulated_layer(**{**given, "next_styles": None}, padding=1, plain=False)  # type: ignore[arg-type]

"""adain_act by the kernels equals the reference in float64: every type and layout; gradients; statistics; tracing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from lanes import DTYPES, LANES, LAYOUTS, Lane, close, drawn
from torch import Tensor

from sivae_dist.errors import UserError
from sivae_dist.ops import adain_act
from sivae_dist.ops.adain_act import adain_act_reference

pytestmark = pytest.mark.parametrize("lane", LANES, indirect=True)

# Whole and broken packs of 16 bytes and of channels, one pixel, one channel, several chunks, an empty batch.
SHAPES = [(2, 8, 16, 32), (1, 70, 20, 33), (3, 5, 7, 9), (2, 1, 9, 1), (2, 3, 1, 5), (1, 16, 70, 136), (0, 4, 8, 8)]
KINDS = ["all", "encoder", "shared noise", "no bias", "one number"]


def sides(lane: Lane, shape: tuple[int, ...], kind: str = "all", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The small tensors of a call: noise, strength, bias, style."""
    batch, channels, height, width = shape
    noise = {"shared noise": (1, 1, height, width), "one number": (1, 1, 1, 1)}.get(kind, (batch, 1, height, width))
    made = {
        "noise": drawn(*noise, seed=1),
        "noise_strength": drawn(channels, seed=2),
        "bias": drawn(channels, seed=3),
        "style": drawn(batch, 2 * channels, seed=4),
    }
    kept = {"encoder": ["bias"], "no bias": ["noise", "noise_strength", "style"]}.get(kind, list(made))
    return {name: made[name].to(lane.device, dtype) for name in kept}


def grown(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def wanted_for(x: Tensor, beside: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    return adain_act_reference(x.double(), **{k: v.double() for k, v in beside.items()}, **more)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(lane: Lane, kind: str, dtype: torch.dtype, layout: Any) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in SHAPES:
        x = lane.put(drawn(*shape), dtype, layout)
        beside = sides(lane, shape, kind, wide)
        found, wanted = adain_act(x, **beside, eps=1e-5), wanted_for(x, beside, eps=1e-5)
        for one, other in zip(found, wanted, strict=True):
            close(one, other)
        y, mean, std = found
        assert y.dtype == dtype and mean.dtype == std.dtype == wide and y.device == mean.device == x.device
        assert y.is_contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else layout)


def test_statistics_do_not_cancel(lane: Lane) -> None:
    """A mean 3000 times the deviation: a difference of mean squares would be left with nothing in single precision."""
    for layout in LAYOUTS:
        x = lane.put(drawn(2, 5, 40, 50) + 3e3, torch.float32, layout)
        for one, other in zip(adain_act(x), wanted_for(x, {}), strict=True):
            close(one, other, size=max(1.0, 1e-3 * float(other.abs().max())) * 100)
        assert float((adain_act(x)[2].double() - wanted_for(x, {})[2]).abs().max()) < 1e-4


def test_inputs_that_are_not_dense(lane: Lane) -> None:
    x = lane.put(drawn(2, 12, 10, 20), torch.float32)
    for view in (x[:, ::2], x.transpose(2, 3), x[:, :, 1:-1, 3:], x[:1].expand(2, 12, 10, 20), x.permute(1, 0, 2, 3)):
        beside = sides(lane, tuple(view.shape))
        for one, other in zip(adain_act(view, **beside), wanted_for(view, beside), strict=True):
            close(one, other)


def test_one_sample_under_several_styles(lane: Lane) -> None:
    """The decoder's first layer: its constant has no batch yet."""
    x, style = lane.put(drawn(1, 6, 4, 4), torch.float32), lane.put(drawn(3, 12, seed=1), torch.float32)
    noise, strength = lane.put(drawn(1, 1, 4, 4, seed=2), torch.float32), lane.put(drawn(6, seed=3), torch.float32)
    leaves = grown(x, strength, style)
    y = adain_act(leaves[0], noise, leaves[1], style=leaves[2])[0]
    others = [t.double() for t in leaves]
    wanted = adain_act_reference(others[0], noise.double(), others[1], None, others[2])[0]
    close(y, wanted)
    weight = lane.put(drawn(*y.shape, seed=9), torch.float32)
    for one, other in zip(
        torch.autograd.grad(y, leaves, weight), torch.autograd.grad(wanted, leaves, weight.double()), strict=True
    ):
        assert one.shape == other.shape
        close(one, other.double())
    last = x.contiguous(memory_format=torch.channels_last)
    assert adain_act(last, noise, strength, style=style)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(lane: Lane, kind: str, dtype: torch.dtype, layout: Any) -> None:
    """Of everything, for gradients of all three results that are not one."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in SHAPES:
        beside = sides(lane, shape, kind, wide)
        x = lane.put(drawn(*shape), dtype, layout)
        leaves, others = grown(x, *beside.values()), grown(x.double(), *(t.double() for t in beside.values()))
        found = adain_act(leaves[0], **dict(zip(beside, leaves[1:], strict=True)), eps=1e-5)
        wanted = adain_act_reference(others[0], **dict(zip(beside, others[1:], strict=True)), eps=1e-5)
        weights = [lane.put(drawn(*t.shape, seed=5 + k), t.dtype) for k, t in enumerate(found)]
        a = torch.autograd.grad(found, leaves, weights)
        b = torch.autograd.grad(wanted, others, [w.double() for w in weights])
        for name, one, other in zip(["x", *beside], a, b, strict=True):
            assert one.shape == other.shape
            size = max(1.0, float(other.abs().max()) if other.numel() else 1.0)
            if name == "noise":  # a sum of n rounded numbers of order one
                size = max(size, 4.0 * (x.numel() / max(1, other.numel())) ** 0.5)
            close(one.to(dtype) if one.dtype == torch.float32 else one, other, 2 * size)
        assert a[0].is_contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
def test_gradcheck(lane: Lane, layout: Any) -> None:
    shape = (2, 3, 3, 4)
    beside = sides(lane, shape, dtype=torch.float64)
    leaves = grown(lane.put(drawn(*shape), layout=layout), *beside.values())
    assert torch.autograd.gradcheck(lambda x, n, s, b, t: adain_act(x, n, s, b, t, eps=1e-3), leaves)


def test_a_constant_channel_has_finite_gradients(lane: Lane) -> None:
    """Zero deviation, whose gradient counts as zero; the map itself comes out as the style's shift."""
    for layout, value in itertools.product(LAYOUTS, (0.0, -1.25, 0.1)):
        x = lane.put(torch.full((2, 5, 8, 8), value), torch.float32, layout).requires_grad_()
        y, mean, std = adain_act(x, style=sides(lane, (2, 5, 8, 8))["style"])
        gradient = torch.autograd.grad((y.square().sum(), mean.sum(), std.sum()), x)[0]
        assert gradient.isfinite().all() and y.isfinite().all()
        if value != 0.1:  # sums of it are exact
            assert torch.equal(std, torch.zeros_like(std))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_channel_alone(lane: Lane, value: float) -> None:
    for layout, (i, j) in itertools.product(LAYOUTS, ((0, 0), (4, 3))):
        x = lane.put(drawn(2, 8, 9, 8), torch.float32, layout)
        x[1, 2, i, j] = value
        found, wanted = adain_act(x, bias=x.new_zeros(8)), wanted_for(x, {"bias": x.new_zeros(8)})
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one.isnan(), other.isnan()) and torch.equal(one.isinf(), other.isinf())
            assert not one[1, 2].isfinite().any() and one.isfinite().sum() == one.numel() - one[1, 2].numel()


def test_a_gradient_that_is_not_finite_is_passed_on(lane: Lane) -> None:
    for layout in LAYOUTS:
        x = lane.put(drawn(2, 4, 5, 6), torch.float32, layout).requires_grad_()
        bias = x.new_zeros(4).requires_grad_()
        weight = lane.put(drawn(2, 4, 5, 6), torch.float32, layout)
        weight[0, 1, 2, 3] = float("inf")
        gx, gb = torch.autograd.grad(adain_act(x, bias=bias)[0], (x, bias), weight)
        assert not gx[0, 1].isfinite().any() and gx[1].isfinite().all() and not gb[1].isfinite() and gb[0].isfinite()


def test_a_second_derivative_is_refused(lane: Lane) -> None:
    x = lane.put(drawn(1, 2, 4, 4)).requires_grad_()
    (gradient,) = torch.autograd.grad(adain_act(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(UserError, match="second derivative"):
        gradient.sum().backward()


def test_reruns_are_equal_to_the_bit(lane: Lane) -> None:
    for layout, shape in itertools.product(LAYOUTS, [(4, 16, 33, 64), (2, 3, 130, 129)]):
        beside = sides(lane, shape)
        leaves = grown(lane.put(drawn(*shape), torch.float32, layout), *list(beside.values())[1:])

        def run(noise: Tensor = beside["noise"], leaves: list[Tensor] = leaves) -> list[Tensor]:
            y, mean, std = adain_act(leaves[0], noise, *leaves[1:])
            return [y, mean, std, *torch.autograd.grad((y.square().sum(), std.sum()), leaves)]

        first = run()
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_opcheck(lane: Lane) -> None:
    shape = (2, 8, 6, 4)
    for layout, kind in itertools.product(LAYOUTS, KINDS[:4]):
        x = lane.put(drawn(*shape), torch.float32, layout).requires_grad_()
        beside = sides(lane, shape, kind)
        given = [beside.get(name) for name in ("noise", "noise_strength", "bias", "style")]
        torch.library.opcheck(lane.ops.adain_act.default, (x, *given, 1e-5, 0.2))
        y, mean, std = lane.ops.adain_act(x.detach(), *given, 1e-5, 0.2)
        torch.library.opcheck(
            lane.ops.adain_act_backward.default, (y, x.detach(), *given, mean, std, mean, std, 1e-5, 0.2)
        )


def test_no_graph_break(lane: Lane) -> None:
    beside = sides(lane, (1, 2, 5, 4))

    def loss(x: Tensor) -> Tensor:
        y, mean, std = adain_act(x.sin(), **beside)
        return y.square().sum() + (mean * std).sum()

    x = lane.put(drawn(1, 2, 5, 4), torch.float32).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, wanted = torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x)
    close(found[0], wanted[0].double())


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_type_to_the_input(lane: Lane, amp: torch.dtype) -> None:
    for dtype in (torch.float32, amp):
        x, beside = lane.put(drawn(1, 2, 4, 8), dtype), sides(lane, (1, 2, 4, 8))
        with torch.autocast(lane.device, dtype=amp):
            found = adain_act(x, **beside)
        assert found[0].dtype == dtype and all(
            torch.equal(a, b) for a, b in zip(found, adain_act(x, **beside), strict=True)
        )

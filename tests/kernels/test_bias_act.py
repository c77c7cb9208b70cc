"""bias_act by the kernels equals the reference in float64: every activation, type and layout; gradients; tracing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from lanes import DTYPES, LANES, LAYOUTS, Lane, close, drawn
from torch import Tensor

from sivae_dist.errors import UserError
from sivae_dist.ops import bias_act, kernels
from sivae_dist.ops._fused_bias_act import ACTS, source
from sivae_dist.ops.bias_act import ACTIVATIONS, bias_act_reference

pytestmark = pytest.mark.parametrize("lane", LANES, indirect=True)

SHAPES = [(2, 3, 5, 7), (1, 16, 16, 16), (3, 8, 1, 1), (0, 4, 3, 3), (2, 33, 9, 8), (1, 2, 80, 80), (2, 5), (2, 6, 11)]
SIDES = list(itertools.product((False, True), ("none", "each", "shared")))


def made(lane: Lane, shape: tuple[int, ...], bias: bool, noise: str) -> tuple[Tensor | None, ...]:
    """(bias, noise, strength) in float64."""
    b = lane.put(drawn(shape[1], seed=1)) if bias else None
    if noise == "none":
        return b, None, None
    rows = 1 if noise == "shared" else shape[0]
    return b, lane.put(drawn(rows, 1, *shape[2:], seed=2)), lane.put(torch.tensor(0.7, dtype=torch.float64))


def narrowed(sides: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.float() for t in sides)


@pytest.mark.parametrize("act", ACTS)
def test_equals_the_reference(lane: Lane, act: str) -> None:
    for layout, (bias, noise), clamp in itertools.product(LAYOUTS, SIDES, (None, 0.8)):
        for number, shape in enumerate(SHAPES):
            x = lane.put(drawn(*shape, seed=number) * 2, torch.float32, layout if len(shape) == 4 else None)
            sides = narrowed(made(lane, shape, bias, noise))
            wide = tuple(None if t is None else t.double() for t in sides)
            found = bias_act(x, *sides, act, clamp=clamp)
            close(found, bias_act_reference(x.double(), *wide, act, clamp=clamp))
            if len(shape) == 4:
                assert found.is_contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else layout)


def test_alpha_and_gain(lane: Lane) -> None:
    x = lane.put(drawn(2, 4, 5, 5), torch.float32).requires_grad_()
    for alpha, gain in itertools.product((-0.5, 0.0, 0.3, 1.5), (-1.2, 0.0, 2.0)):
        found = bias_act(x, act="lrelu", alpha=alpha, gain=gain)
        wanted = bias_act_reference(x, act="lrelu", alpha=alpha, gain=gain)
        close(found, wanted)
        weight = lane.put(drawn(2, 4, 5, 5, seed=3), torch.float32)
        close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (found, wanted)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["linear", "relu", "lrelu", "tanh", "swish"])
def test_types_forward_and_backward(lane: Lane, act: str, dtype: torch.dtype, layout: Any) -> None:
    """Against float64 from the same rounded inputs. From a rounded output the slope of tanh is good to the type."""
    for shape in [(2, 8, 16, 16), (2, 5, 7, 3), (1, 40, 70, 70), (3, 24, 4, 4)]:
        x = lane.put(drawn(*shape), dtype, layout).requires_grad_()
        sides = [t.requires_grad_() for t in narrowed(made(lane, shape, True, "each")) if t is not None]
        if dtype == torch.float64:
            sides = [t.detach().double().requires_grad_() for t in sides]
        y = bias_act(x, *sides, act, clamp=1.6)
        weight = lane.put(drawn(*shape, seed=5), dtype, layout)
        gradients = torch.autograd.grad(y, [x, *sides], weight)
        leaves = [t.detach().double().requires_grad_() for t in (x, *sides)]
        wanted_y = bias_act_reference(*leaves, act, clamp=1.6)
        wanted = torch.autograd.grad(wanted_y, leaves, weight.double())
        assert y.dtype == dtype and [g.dtype for g in gradients] == [dtype, *(t.dtype for t in sides)]
        close(y, wanted_y.detach())
        at_the_bound = (wanted_y.abs() - 1.6).abs() < 0.01  # rounding may carry a value over it
        close(gradients[0].where(~at_the_bound, 0), wanted[0].where(~at_the_bound, 0))
        slack = 4.0 * weight.abs().where(at_the_bound, 0).sum().item()
        rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
        for found, exact in zip(gradients[1:], wanted[1:], strict=True):
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=slack + rounding * float(exact.abs().max()))


def test_gradcheck(lane: Lane) -> None:
    for act, layout, noise, clamp in itertools.product(ACTS, LAYOUTS, ("each", "shared"), (None, 1.1)):
        shape = (2, 3, 2, 3)
        x = lane.put(drawn(*shape), layout=layout).requires_grad_()
        sides = [t.requires_grad_() for t in made(lane, shape, True, noise) if t is not None]
        assert torch.autograd.gradcheck(lambda *t, a=act, c=clamp: bias_act(*t, a, clamp=c), (x, *sides))


@pytest.mark.parametrize("act", ACTS)
def test_what_is_not_finite_passes_as_in_the_reference(lane: Lane, act: str) -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e30, -1e30, 2.0, -200.0])
    for clamp, layout in itertools.product((None, 3.0), LAYOUTS):
        x = lane.put(values.reshape(1, 1, 3, 3).repeat(2, 8, 1, 1), torch.float32, layout)
        found, wanted = [], []
        for function, kept in ((bias_act, found), (bias_act_reference, wanted)):
            leaf = x.clone().requires_grad_()
            y = function(leaf, act=act, clamp=clamp)
            kept += [y.detach(), torch.autograd.grad(y, leaf, torch.full_like(y, 2.0))[0]]
        torch.testing.assert_close(found[0], wanted[0], equal_nan=True, rtol=1e-6, atol=1e-6)
        if clamp is not None:  # the derivative where the value is NaN is zero here, zero or NaN there
            for gradient in (found[1], wanted[1]):
                gradient[x.isnan()] = 0
        if act not in {"selu", "elu", "softplus", "swish"}:  # theirs at infinity differ between PyTorch's own builds
            torch.testing.assert_close(found[1], wanted[1], equal_nan=True, rtol=1e-5, atol=1e-6)


def test_inputs_and_gradients_that_are_not_dense(lane: Lane) -> None:
    x, b = lane.put(drawn(2, 12, 10, 20), torch.float32), lane.put(drawn(12, seed=1), torch.float32)
    for view in (x.transpose(2, 3), x[:, :, 1:-1, 3:], x[:1].expand(2, 12, 10, 20), x[:, ::2].repeat(1, 2, 1, 1)):
        close(bias_act(view, b), bias_act_reference(view, b))
    for layout in LAYOUTS:
        y = x.contiguous(memory_format=layout).requires_grad_()
        for weight in (torch.ones((), device=x.device).expand(x.shape), x.transpose(2, 3).contiguous().transpose(2, 3)):
            found, wanted = (
                torch.autograd.grad(f(y, b.requires_grad_()), [y, b], weight) for f in (bias_act, bias_act_reference)
            )
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_sums_do_not_depend_on_threads_and_repeat_to_the_bit(lane: Lane) -> None:
    for layout in LAYOUTS:
        x = lane.put(drawn(3, 20, 65, 67), torch.float32, layout).requires_grad_()
        sides = [t.requires_grad_() for t in narrowed(made(lane, x.shape, True, "each")) if t is not None]
        weight = lane.put(drawn(*x.shape, seed=4), torch.float32)
        before = torch.get_num_threads()
        try:
            runs = []
            for threads in (1, 2, 3, 1):
                torch.set_num_threads(threads)
                runs.append(torch.autograd.grad(bias_act(x, *sides), [x, *sides], weight))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_a_second_derivative_is_refused(lane: Lane) -> None:
    x = lane.put(drawn(1, 2, 4, 4)).requires_grad_()
    (gradient,) = torch.autograd.grad(bias_act(x, act="tanh").square().sum(), x, create_graph=True)
    with pytest.raises(UserError, match="second derivative"):
        gradient.sum().backward()


def test_opcheck(lane: Lane) -> None:
    for layout, act in itertools.product(LAYOUTS, ("lrelu", "swish", "linear")):
        x = lane.put(drawn(2, 4, 3, 5), torch.float32, layout).requires_grad_()
        sides = [t.requires_grad_() for t in narrowed(made(lane, x.shape, True, "each")) if t is not None]
        numbers = (ACTS.index(act), 0.2, 1.4, -1.0)
        torch.library.opcheck(lane.ops.bias_act.default, (x, *sides, *numbers))
        torch.library.opcheck(lane.ops.bias_act.default, (x, None, None, None, *numbers))
        plain = [t.detach() for t in (x, x, *sides)]
        torch.library.opcheck(lane.ops.bias_act_backward.default, (*plain, *numbers, act == "lrelu", True, True))


def test_no_graph_break(lane: Lane) -> None:
    x = lane.put(drawn(2, 4, 3, 5), torch.float32).requires_grad_()
    sides = [t.requires_grad_() for t in narrowed(made(lane, x.shape, True, "each")) if t is not None]

    def loss(*tensors: Tensor) -> Tensor:
        return bias_act(tensors[0].sin(), *tensors[1:], "lrelu", clamp=2.0).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, wanted = (torch.autograd.grad(f(x, *sides), [x, *sides]) for f in (compiled, loss))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_type_to_the_input(lane: Lane, amp: torch.dtype) -> None:
    for dtype in (torch.float32, amp):
        x, b = lane.put(drawn(1, 2, 4, 8), dtype), lane.put(drawn(2, seed=1), torch.float32)
        with torch.autocast(lane.device, dtype=amp):
            found = bias_act(x, b)
        assert found.dtype == dtype and torch.equal(found, bias_act(x, b))


def test_the_lists_agree(lane: Lane) -> None:
    """The kernels count activations in the order of the Python names; what is kept for the derivative is as stated."""
    assert tuple(ACTIVATIONS) == ACTS
    assert source("linear", 0, 1, -1) == "nothing" and source("swish", 0, 1, -1) == "input"
    assert {source(act, 0.2, 1.0, 1.0) for act in ACTS if act != "swish"} == {"output"}
    assert source("lrelu", -0.1, 1.0, -1) == source("tanh", 0, -1.0, -1) == "input"
    assert kernels.selected(torch.ones(1, device=lane.device))

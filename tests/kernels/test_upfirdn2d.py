"""upfirdn2d by the kernels equals the reference in float64: every path, type and layout; gradients; tracing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from lanes import DTYPES, LANES, LAYOUTS, Lane, close, drawn
from torch import Tensor

from sivae_dist.errors import UserError
from sivae_dist.ops import setup_filter, upfirdn2d
from sivae_dist.ops.upfirdn2d import upfirdn2d_reference

pytestmark = pytest.mark.parametrize("lane", LANES, indirect=True)

SMOOTH = setup_filter([1, 3, 3, 1]).double()  # 4 x 4, separable
FILTERS = {
    "none": None,
    "two": drawn(2, 1, seed=1),
    "four": drawn(4, seed=2),
    "eight": drawn(8, seed=3),
    "smooth": SMOOTH,
    "4x4": drawn(4, 4, seed=4),
    "3x5": drawn(3, 5, seed=5),
}
FACTORS = [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (2, 2)), ((2, 1), (1, 3)), ((3, 2), (2, 2)), ((2, 2), (2, 2))]
PADDINGS = [(0, 0, 0, 0), (2, 1, 2, 1), (1, 2, 3, 2), (-1, 3, 2, -1), (9, 8, 8, 9)]
SIZES = [(1, 1), (5, 7), (8, 16), (19, 34)]


def fits(size: tuple[int, int], f: Tensor | None, up: tuple[int, int], pads: tuple[int, ...]) -> bool:
    height, width = (1, 1) if f is None else (f.shape[0], f.shape[-1])
    return size[0] * up[1] + sum(pads[2:]) >= height and size[1] * up[0] + sum(pads[:2]) >= width


def both(lane: Lane, x: Tensor, f: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """(kernel, reference in float64 from the same rounded input)."""
    taps = None if f is None else f.to(lane.device)
    wanted = upfirdn2d_reference(x.double(), taps, *arguments)
    return upfirdn2d(x, taps, *arguments), wanted


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(("up", "down"), FACTORS)
def test_equals_the_reference(lane: Lane, up: Any, down: Any, name: str, layout: Any) -> None:
    f = FILTERS[name]
    for number, (size, pads, flip) in enumerate(itertools.product(SIZES, PADDINGS, (False, True))):
        if fits(size, f, up, pads):
            x = lane.put(drawn(2, 3, *size, seed=number), torch.float32, layout)
            found, wanted = both(lane, x, f, up, down, pads, flip, 1.7)
            close(found, wanted)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("up", "down"), FACTORS[:3])
def test_types_and_layouts(lane: Lane, dtype: torch.dtype, layout: Any, up: Any, down: Any) -> None:
    """Widths and channels with and without whole packs of 16 bytes, several tiles, more than one map."""
    for shape in [(2, 8, 16, 32), (1, 16, 70, 136), (3, 5, 13, 17), (0, 4, 8, 8), (2, 1, 9, 1), (1, 24, 3, 3)]:
        x = lane.put(drawn(*shape), dtype, layout)
        for f in (SMOOTH, FILTERS["four"], FILTERS["4x4"]):
            found, wanted = both(lane, x, f, up, down, (2, 1, 2, 1))
            close(found, wanted)
            assert found.dtype == dtype and found.device == x.device
            assert found.is_contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else layout)


def test_inputs_that_are_not_dense(lane: Lane) -> None:
    x = lane.put(drawn(2, 12, 10, 20), torch.float32)
    for view in (x[:, ::2], x.transpose(2, 3), x[:, :, 1:-1, 3:], x[:1].expand(2, 12, 10, 20), x.permute(1, 0, 2, 3)):
        found, wanted = both(lane, view, SMOOTH, 2, 1, (2, 1, 2, 1))
        close(found, wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("up", "down"), FACTORS)
def test_what_is_not_finite_goes_where_the_taps_go(lane: Lane, value: float, up: Any, down: Any) -> None:
    for layout, f in itertools.product(LAYOUTS, (FILTERS["four"], FILTERS["4x4"])):
        x = lane.put(drawn(1, 8, 9, 8), torch.float32, layout)
        x[0, 1, 4, 3] = x[0, 2, 0, 0] = x[0, 3, 8, 7] = value
        found, wanted = both(lane, x, f, up, down, (2, 1, 2, 1))
        assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.isinf(), wanted.isinf())
        assert not found.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize(("up", "down"), FACTORS)
def test_gradient(lane: Lane, up: Any, down: Any, layout: Any) -> None:
    """Against autograd through the reference, for a gradient of the output that is not one; and by differences."""
    for f, pads in itertools.product((None, SMOOTH, FILTERS["3x5"], FILTERS["four"]), PADDINGS):
        x = lane.put(drawn(2, 4, 6, 8), torch.float32, layout).requires_grad_()
        found = upfirdn2d(x, None if f is None else f.to(lane.device), up, down, pads, False, 0.7)
        weight = lane.put(drawn(*found.shape, seed=9), torch.float32)
        (gradient,) = torch.autograd.grad((found * weight).sum(), x)
        y = x.detach().double().requires_grad_()
        taps = None if f is None else f.to(lane.device)
        (wanted,) = torch.autograd.grad((upfirdn2d_reference(y, taps, up, down, pads, False, 0.7) * weight).sum(), y)
        close(gradient, wanted)
        assert gradient.is_contiguous(memory_format=layout)


def test_gradcheck(lane: Lane) -> None:
    for (up, down), f in itertools.product(FACTORS, (SMOOTH, FILTERS["3x5"], FILTERS["four"])):
        x, taps = lane.put(drawn(1, 2, 4, 5)).requires_grad_(), f.to(lane.device)
        assert torch.autograd.gradcheck(lambda x, u=up, d=down, t=taps: upfirdn2d(x, t, u, d, (2, 1, 3, 2)), (x,))


def test_a_second_derivative_is_refused(lane: Lane) -> None:
    x = lane.put(drawn(1, 2, 4, 4)).requires_grad_()
    (gradient,) = torch.autograd.grad(upfirdn2d(x, SMOOTH, 2).square().sum(), x, create_graph=True)
    with pytest.raises(UserError, match="second derivative"):
        gradient.sum().backward()


def test_reruns_are_equal_to_the_bit(lane: Lane) -> None:
    x = lane.put(drawn(4, 16, 33, 64), torch.float32)
    for up, down in FACTORS:
        first = upfirdn2d(x, SMOOTH, up, down, (2, 1, 2, 1))
        assert all(torch.equal(first, upfirdn2d(x, SMOOTH, up, down, (2, 1, 2, 1))) for _ in range(3))


def test_opcheck(lane: Lane) -> None:
    f = SMOOTH.float().to(lane.device)
    for layout in LAYOUTS:
        for arguments in ((2, 2, 1, 1, 2, 1, 2, 1, False, 4.0), (1, 1, 2, 2, 1, 1, 1, 1, True, 1.0)):
            x = lane.put(drawn(2, 8, 6, 4), torch.float32, layout).requires_grad_()
            torch.library.opcheck(lane.ops.upfirdn2d.default, (x, f, *arguments))
            torch.library.opcheck(lane.ops.upfirdn2d_backward.default, (x.detach(), f, *arguments))
    torch.library.opcheck(lane.ops.upfirdn2d.default, (lane.put(drawn(1, 1, 3, 3)), None, *arguments))


def test_no_graph_break(lane: Lane) -> None:
    def loss(x: Tensor) -> Tensor:
        return upfirdn2d(x.sin(), SMOOTH, 2, 1, (2, 1, 2, 1), gain=4.0).square().sum()

    x = lane.put(drawn(1, 2, 5, 4), torch.float32).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, wanted = torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x)
    close(found[0], wanted[0].double())
    assert any("upfirdn2d" in str(n.target) for n in _graph(loss, x).nodes)


def _graph(function: Any, x: Tensor) -> Any:
    graphs: list[Any] = []

    def keep(module: Any, inputs: Any) -> Any:
        graphs.append(module.graph)
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, fullgraph=True, backend=keep)(x.detach())
    return graphs[0]


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_type_to_the_input(lane: Lane, amp: torch.dtype) -> None:
    for dtype in (torch.float32, amp):
        x = lane.put(drawn(1, 2, 4, 8), dtype)
        with torch.autocast(lane.device, dtype=amp):
            found = upfirdn2d(x, SMOOTH.float(), 2)
        assert found.dtype == dtype and torch.equal(found, upfirdn2d(x, SMOOTH.float(), 2))

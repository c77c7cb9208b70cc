"""norm_act by the kernels equals torch's operators in float64: norms, skips, sizes, types, layouts, ranks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from lanes import DTYPES, LANES, LAYOUTS, Lane, close, drawn
from norm_cases import KINDS, SHAPES, compare, fitting, make
from torch import Tensor, nn

from sivae_dist.distributed.group import Group
from sivae_dist.distributed.sync_batch_norm import synchronise_batch_norm
from sivae_dist.errors import UserError
from sivae_dist.ops import kernels, norm_act

pytestmark = pytest.mark.parametrize("lane", LANES, indirect=True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(lane: Lane, kind: str, dtype: torch.dtype, layout: Any) -> None:
    for number, (shape, where, resample) in enumerate(fitting(SHAPES)):
        if dtype in (torch.float32, torch.bfloat16) or number % 3 == 0:
            compare(norm_act, lane.put(drawn(*shape), dtype, layout), kind, where, resample, layout, lane.device)


def test_inputs_that_are_not_dense(lane: Lane) -> None:
    x = lane.put(drawn(2, 12, 10, 20), torch.float32)
    for view in (x[:, ::2], x.transpose(2, 3), x[:, :, 1:-1, 3:], x.permute(1, 0, 2, 3)):
        norm = make("batch", view.shape[1]).to(lane.device)
        skip = view.flip(0).contiguous(memory_format=torch.channels_last)
        with kernels.using("reference"):
            wanted = norm_act(view.double(), make("batch", view.shape[1], double=True).to(lane.device), skip.double())
        close(norm_act(view, norm, skip), wanted)


@pytest.mark.parametrize("kind", ["batch", "group", "evaluated"])
def test_gradcheck(lane: Lane, kind: str) -> None:
    norm = make(kind, 4, double=True).to(lane.device)
    for layout, where, resample in itertools.product(LAYOUTS, ("last", "first"), ("none", "down", "up")):
        x, skip = (lane.put(drawn(2, 4, 3, 4, seed=k), layout=layout).requires_grad_() for k in (1, 2))

        def run(
            x: Tensor, skip: Tensor, *_: Tensor, first: bool = where == "first", resample: Any = resample
        ) -> Tensor:
            return norm_act(x, norm, skip, skip_first=first, resample=resample)

        assert torch.autograd.gradcheck(run, (x, skip, *norm.parameters()))


def test_statistics_of_all_ranks(lane: Lane) -> None:
    """The first of two ranks, each with half of a batch, has that half of what one rank with all of it has."""
    x, skip = (lane.put(drawn(6, 4, 6, 5, seed=k), torch.float32) for k in (3, 4))
    leaf = x.clone().requires_grad_()
    y = norm_act(leaf, make("batch", 4).to(lane.device), skip, resample="down")
    (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
    for mode in (lane.mode, "reference"):
        with kernels.using(mode):  # type: ignore[arg-type]
            found = simulated(lane, x, skip)
        close(found[0], y[:3].double())
        close(found[1], gradient[:3].double(), 2 * float(gradient.abs().max()))


def simulated(lane: Lane, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """The first rank's output and gradient. Every collective of it hears what the second one says at the same point."""
    parts = [(x[:3], skip[:3]), (x[3:], skip[3:])]
    spoken: list[list[Tensor]] = [[], []]
    result: tuple[Tensor, Tensor] | None = None
    for _ in range(4):  # three collectives in all: each round one more of them is right on both ranks
        saying: list[list[Tensor]] = [[], []]
        for rank, (own_x, own_skip) in enumerate(parts):

            def add(tensor: Tensor, own: Any = saying[rank], other: Any = spoken[1 - rank]) -> Tensor:
                place = len(own)
                own.append(tensor.clone())
                return tensor.add_(other[place]) if place < len(other) else tensor

            norm = nn.Sequential(make("batch", 4).to(lane.device))
            synchronise_batch_norm(norm, Group(rank, 2))
            group = Group(rank, 2)
            object.__setattr__(group, "sum_", add)
            norm[0].group = group
            leaf = own_x.clone().requires_grad_()
            y = norm_act(leaf, norm[0], own_skip, resample="down")
            y.square().sum().backward()
            if rank == 0:
                result = y.detach(), leaf.grad
        spoken = saying
    assert result is not None and len(spoken[0]) == len(spoken[1]) == 3
    return result


def test_what_is_not_finite_stays_so(lane: Lane) -> None:
    for layout, value, kind in itertools.product(LAYOUTS, (float("nan"), float("inf")), ("batch", "group")):
        x = lane.put(drawn(2, 4, 9, 8), torch.float32, layout)
        x[1, 2, 4, 3] = value
        norm = make(kind, 4).to(lane.device)
        y = norm_act(x, norm)
        spoilt = y[:, 2] if kind == "batch" else y[1, 2:]
        assert not spoilt.isfinite().any() and y.isfinite().sum() == y.numel() - spoilt.numel()
        if kind == "batch":
            assert not norm.running_mean[2].isfinite() and norm.running_mean[0].isfinite()


def test_what_torch_refuses_is_refused(lane: Lane) -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_act(lane.put(drawn(1, 4, 1, 1), torch.float32), make("batch", 4).to(lane.device))
    with pytest.raises(ValueError, match="no 2 x 2 pixels"):
        norm_act(lane.put(drawn(1, 4, 1, 5), torch.float32), make("batch", 4).to(lane.device), resample="down")
    with pytest.raises(ValueError, match="skip is"):
        norm_act(lane.put(drawn(2, 4, 3, 5)), make("batch", 4), lane.put(drawn(2, 4, 3, 4)))


def test_a_second_derivative_is_refused(lane: Lane) -> None:
    x = lane.put(drawn(2, 2, 4, 4)).requires_grad_()
    norm = make("batch", 2, double=True).to(lane.device)
    (gradient,) = torch.autograd.grad(norm_act(x, norm).square().sum(), x, create_graph=True)
    with pytest.raises(UserError, match="second derivative"):
        gradient.sum().backward()


def test_reruns_are_equal_to_the_bit(lane: Lane) -> None:
    for layout, kind in itertools.product(LAYOUTS, ("batch", "group")):
        norm = make(kind, 16).to(lane.device)
        x, skip = (lane.put(drawn(4, 16, 65, 64, seed=k), torch.float32, layout).requires_grad_() for k in (1, 2))

        def run(x: Tensor = x, skip: Tensor = skip, norm: nn.Module = norm) -> list[Tensor]:
            y = norm_act(x, norm, skip, resample="down")
            return [y, *torch.autograd.grad(y.square().sum(), (x, skip, *norm.parameters()))]

        first = run()
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize(
    "ways", [[(LAYOUTS[0], 1, False), (LAYOUTS[-1], 2, True)], pytest.param(None, marks=pytest.mark.slow, id="all")]
)
def test_opcheck(lane: Lane, ways: list[tuple[torch.memory_format, int, bool]] | None) -> None:
    ops = lane.ops
    for layout, resample, first in ways or itertools.product(LAYOUTS, (0, 1, 2), (False, True)):
        x, skip = (lane.put(drawn(2, 8, 6, 4, seed=k), torch.float32, layout) for k in (1, 2))
        channel = [lane.put(drawn(2, 8, seed=k), torch.float32) for k in range(3, 8)]
        how = (first, resample, 0.2)
        g = ops.norm_act_apply(x, skip, *channel[:3], *how)
        torch.library.opcheck(ops.norm_act_moments.default, (x, skip))
        torch.library.opcheck(ops.norm_act_apply.default, (x, skip, *channel[:3], *how))
        torch.library.opcheck(ops.norm_act_sums.default, (g, x, skip, *channel[:3], *how))
        for want in (False, True):
            torch.library.opcheck(ops.norm_act_gradients.default, (g, x, skip, *channel, *how, want))


@pytest.mark.parametrize("kind", ["batch", "group", "evaluated"])
def test_no_graph_break(lane: Lane, kind: str) -> None:
    norm = make(kind, 2).to(lane.device)

    def loss(x: Tensor) -> Tensor:
        return norm_act(x.sin(), norm, x, resample="down").square().sum()

    x = lane.put(drawn(2, 2, 5, 4), torch.float32).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, wanted = torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x)
    close(found[0], wanted[0].double())


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_type_to_the_input(lane: Lane, amp: torch.dtype) -> None:
    for dtype, kind in itertools.product((torch.float32, amp), ("batch", "group")):
        x = lane.put(drawn(2, 4, 4, 8), dtype)
        with torch.autocast(lane.device, dtype=amp):
            found = norm_act(x, make(kind, 4).to(lane.device), x)
            with kernels.using("reference"):
                plain = norm_act(x, make(kind, 4).to(lane.device), x)
        assert found.dtype == plain.dtype == dtype
        close(found, plain.double(), 4 * float(plain.detach().abs().max()))

"""What only a device can show: streams, graphs, devices, sizes beyond 32 bits. For ./tests/run.sh --gpu."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lanes import LAYOUTS, drawn

from sivae_dist.ops import bias_act, kernels, setup_filter, upfirdn2d

pytestmark = pytest.mark.gpu

SMOOTH = setup_filter([1, 3, 3, 1])


@pytest.fixture(autouse=True)
def fused() -> Iterator[None]:
    with kernels.using("cuda"):
        assert kernels.serves("cuda")
        yield


def step(x: torch.Tensor, bias: torch.Tensor, taps: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = bias_act(upfirdn2d(x, taps, 2, 1, (2, 1, 2, 1), gain=4.0), bias)
    return y, *torch.autograd.grad(y, [x, bias], torch.ones_like(y))


def inputs(layout: Any, device: str = "cuda") -> list[torch.Tensor]:
    x = drawn(2, 16, 32, 32).float().to(device).contiguous(memory_format=layout).requires_grad_()
    return [x, drawn(16, seed=1).float().to(device).requires_grad_(), SMOOTH.to(device)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
def test_a_captured_graph_replays(layout: Any) -> None:
    """Capture fails for a launch on any stream but the current one, and for every wait of the host."""
    tensors = inputs(layout)
    # Values only: a graph that lives on holds the leaves' nodes, which belong to this stream, and the capture would use
    # them ("would make the legacy stream depend on a capturing blocking stream").
    wanted = [result.detach().clone() for result in step(*tensors)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(*tensors)
    with torch.no_grad():
        for result in found:
            result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_the_device_is_the_tensors() -> None:
    last = torch.cuda.device_count() - 1
    with torch.cuda.device(0):
        results = step(*inputs(torch.contiguous_format, f"cuda:{last}"))
        assert {r.device.index for r in results} == {last} and torch.cuda.current_device() == 0


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize(("up", "down"), [(1, 2), (1, 1), (3, 4)])
def test_more_elements_than_32_bits_count(layout: Any, up: int, down: int) -> None:
    """The last of 33 images, beyond 2^31 elements, comes out as it does alone. Takes some 14 GiB."""
    x = torch.zeros(33, 1024, 256, 256, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=layout)
    x[-1] = drawn(1024, 256, 256).to(x)
    bias = drawn(1024, seed=1).float().cuda()
    assert x.numel() > 2**31
    taps = SMOOTH.cuda()
    assert torch.equal(upfirdn2d(x, taps, up, down, 2)[-1:], upfirdn2d(x[-1:], taps, up, down, 2))
    if up == down:
        y = bias_act(x.requires_grad_(), bias.requires_grad_())
        assert torch.equal(y[-1:], bias_act(x[-1:], bias))
        ones = torch.ones((), dtype=x.dtype, device="cuda").expand(x.shape)
        dx, dbias = torch.autograd.grad(y, [x, bias], ones)
        alone = torch.autograd.grad(bias_act(x[-1:], bias), [x], torch.ones_like(x[-1:]))[0]
        assert torch.equal(dx[-1:], alone[-1:])
        expected = dx.float().sum(dim=(0, 2, 3))
        torch.testing.assert_close(dbias, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))

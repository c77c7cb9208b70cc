"""Chains of linear layers: oneDNN's products against torch's."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sivae_dist.models.mlp import MlpConfig, make_layers
from sivae_dist.ops import kernels
from sivae_dist.ops.kernels import KernelConfig
from sivae_dist.ops.mlp import mlp, mlp_reference

CPU = torch.device("cpu")
operator = importlib.import_module("sivae_dist.ops.mlp")  # not the function of that name


@pytest.fixture
def onednn() -> Iterator[None]:
    kernels.configure(KernelConfig(dense="onednn"), CPU)
    yield
    kernels.configure(KernelConfig(), CPU)


def chain(widths: list[int], dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(len(widths))
    pairs = list(itertools.pairwise(widths))
    weights = [torch.randn(n, m, generator=generator, dtype=dtype) / m**0.5 for m, n in pairs]
    biases = [torch.randn(n, generator=generator, dtype=dtype) for _, n in pairs]
    return weights, biases


def close(one: Tensor, exact: Tensor) -> None:
    """To float32's rounding of sums of up to 300 products."""
    assert float((one.double() - exact).abs().max()) <= 3e-6 * float(exact.abs().max().clamp_min(1))


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("widths", [[2, 256, 256, 256, 4], [17, 33, 65], [3, 5], [1, 1, 1], [40, 300, 16]])
@pytest.mark.parametrize("rows", [1, 7, 512])
@pytest.mark.parametrize("frozen", [False, True])
def test_values_and_gradients_are_those_of_the_formula(
    widths: list[int], rows: int, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 by torch's own operators, for an output gradient that is not one; frozen: only the input's."""
    used: list[int] = []
    fused = operator._Chain.apply
    monkeypatch.setattr(operator._Chain, "apply", lambda *a: used.append(len(a)) or fused(*a))  # type: ignore[func-returns-value]
    weights, biases = chain(widths)
    x = torch.randn(rows, widths[0], generator=torch.Generator().manual_seed(1))
    out_grad = torch.randn(rows, widths[-1], generator=torch.Generator().manual_seed(2))
    results = []
    for dtype, function in ((torch.float32, mlp), (torch.float64, mlp_reference)):
        leaves = [t.detach().to(dtype).requires_grad_(not frozen) for t in (*weights, *biases)]
        leaves.append(x.detach().to(dtype).requires_grad_())
        out = function(leaves[-1], leaves[: len(weights)], leaves[len(weights) : -1])
        out.backward(out_grad.to(dtype))  # type: ignore[no-untyped-call]
        results.append((out.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)))
    assert len(used) == 1
    assert len(results[0]) == (2 if frozen else 2 * len(weights) + 2)
    for fast, exact in zip(*results, strict=True):
        assert fast is not None
        assert exact is not None
        close(fast, exact)


@pytest.mark.usefixtures("onednn")
def test_inputs_that_need_no_gradient_get_none() -> None:
    weights, biases = chain([2, 32, 2])
    x = torch.randn(4, 2)
    for needed in (weights[1], biases[0], weights[0]):
        needed.requires_grad_()
        mlp(x, weights, biases).sum().backward()  # type: ignore[no-untyped-call]
        expected = torch.autograd.grad(mlp_reference(x, weights, biases).sum(), needed)[0]
        assert needed.grad is not None
        torch.testing.assert_close(needed.grad, expected)
        needed.requires_grad_(False)
    assert x.grad is None


@pytest.mark.usefixtures("onednn")
def test_a_second_derivative_is_refused() -> None:
    weights, biases = chain([2, 32, 1])
    x = torch.randn(4, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(mlp(x, weights, biases).sum(), x, create_graph=True)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("rows", [4, 64])  # torch's products, oneDNN's
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_goes_through(value: float, rows: int) -> None:
    """Also through layers wide enough for oneDNN, whose own ReLU makes zeros of it: in values and gradients."""
    weights, biases = chain([2, 32, 32, 32, 2])
    x = torch.randn(rows, 2)
    x[1, 0] = value
    for function in (mlp, mlp_reference):
        finite = function(x, weights, biases).isfinite().all(1)
        assert finite.tolist() == [row != 1 for row in range(rows)]
    with torch.no_grad():
        biases[2][5] = float("nan")
    for parameter in (*weights, *biases):
        parameter.requires_grad_()
    gradients, x = [], torch.randn(rows, 2)
    for function in (mlp, mlp_reference):
        y = function(x, weights, biases)
        assert not y.isfinite().any()
        gradients.append(torch.autograd.grad(y.square().sum(), [*weights, *biases]))
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.equal(mine.isfinite(), theirs.isfinite())


@pytest.mark.usefixtures("onednn")
def test_torch_serves_what_onednn_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator._Chain, "apply", lambda *_: pytest.fail("oneDNN"))
    weights, biases = chain([2, 32, 2])
    assert mlp(torch.randn(0, 2), weights, biases).shape == (0, 2)
    assert mlp(torch.randn(3, 2).double(), *chain([2, 32, 2], torch.float64)).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mlp(torch.randn(3, 2), weights, biases).dtype == torch.bfloat16
    for plain in (KernelConfig(), KernelConfig(mode="reference", dense="onednn")):
        kernels.configure(plain, CPU)
        assert mlp(torch.randn(3, 2), weights, biases).shape == (3, 2)
    kernels.configure(KernelConfig(dense="onednn"), CPU)
    monkeypatch.setenv("SIVAE_KERNELS", "reference")
    assert mlp(torch.randn(3, 2), weights, biases).shape == (3, 2)


def test_the_reference_is_the_network() -> None:
    layers = make_layers(3, 20, 2, 5)
    x = torch.randn(6, 3)
    linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    mine = mlp(x, [layer.weight for layer in linear], [layer.bias for layer in linear])
    assert torch.equal(mine, layers(x))


@pytest.mark.usefixtures("onednn")
def test_the_published_network_computes_the_same() -> None:
    torch.manual_seed(0)
    model = MlpConfig().build()
    x = torch.randn(512, 2)
    with torch.no_grad():
        fast = model.encoder(x)
        kernels.configure(KernelConfig(), CPU)
        plain = model.encoder(x)
    close(fast.mu, plain.mu.double())
    close(fast.logvar, plain.logvar.double())


def test_lists_that_make_no_chain_are_refused() -> None:
    weights, biases = chain([2, 3, 2])
    for a, b in ((weights, biases[:1]), ([], [])):
        with pytest.raises(ValueError, match="biases"):
            mlp(torch.randn(1, 2), a, b)

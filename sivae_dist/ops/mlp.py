"""A chain of linear layers with ReLU between them, in one step: what the perceptrons of the 2-D experiments are.

On some processors the matrix products that torch chooses by itself (MKL's) reach less than half of what oneDNN's do,
which torch ships as well but takes for float32 only where its compiler fuses. So the fast path calls oneDNN, adds the
bias within the product, does the ReLU in place, keeps one tensor a layer for the backward pass and skips what nobody
asked for (gradients of frozen weights, the input's gradient).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sivae_dist.ops import kernels

_THIN = 16  # products with a side shorter than this gain nothing: torch's own serves them


def mlp(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """h_0 = x; h_i = relu(h_(i-1) W_i^T + b_i); the last layer without ReLU.

    x: (B, F_0), any floating dtype, B may be 0. weights: F_i x F_(i-1) each, biases: (F_i,) each, of x's dtype (under
    autocast any). Returns (B, F_n).
    Differentiable in everything; once, where oneDNN serves it. That is: with `kernels.dense: onednn`, for float32 on a
    CPU outside autocast. Both compute in float32 and differ by the order of their sums.
    Raises ValueError for lists that make no chain.
    """
    if len(weights) != len(biases) or not weights:
        raise ValueError(f"{len(weights)} weights and {len(biases)} biases, expected as many, and at least one")
    if _serves(x, weights):
        out: Tensor = _Chain.apply(x, *weights, *biases)  # type: ignore[no-untyped-call]
        return out
    return mlp_reference(x, weights, biases)


def mlp_reference(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The formula of `mlp` by torch's own operators."""
    h = x
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        h = functional.linear(h, weight, bias)
        if number < len(weights):
            h = functional.relu(h)
    return h


def _serves(x: Tensor, weights: Sequence[Tensor]) -> bool:
    return (
        kernels.dense() == "onednn"
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and all(tensor.dtype == torch.float32 for tensor in (x, *weights))
        and x.ndim == 2
        and len(x) > 0
    )


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """a (M, K) b^T (K, N) + bias, then ReLU if asked for: (M, N). b: (N, K)."""
    if min(a.shape[0], a.shape[1], b.shape[0]) >= _THIN:
        # The operator that torch's compiler emits for a linear layer. It could do the ReLU as well, but oneDNN's makes
        # 0 of what is no number: a model that has diverged would look like one that has not.
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        return product.relu_() if relu else product
    if bias is not None:
        thin = torch.addmm(bias, a, b.t())
        return thin.relu_() if relu else thin
    # MKL is five to ten times as fast with the thin matrix on the left, or with its long side in rows.
    if a.is_contiguous():
        return torch.mm(a, b.contiguous().t())
    return torch.mm(b, a.t()).t() if b.shape[0] < a.shape[0] else torch.mm(a, b.t())


def _reached(parameter: Any) -> bool:
    """Whether this backward pass goes on to a parameter's node: one for some tensors alone leaves others out.

    `ctx.needs_input_grad` only tells what the forward pass saw, so that gradients would be computed for nobody.
    """
    try:
        return bool(torch._C._will_engine_execute_node(parameter))
    except RuntimeError:  # the answer for a leaf that torch.autograd.grad was asked for
        return True


class _Chain(torch.autograd.Function):
    """x, n weights, n biases -> h_n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        layers = len(parameters) // 2
        weights, biases = parameters[:layers], parameters[layers:]
        inputs = [x]  # of each layer; the ReLU's derivative can be read off its output
        for number, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
            inputs.append(_product(inputs[-1], weight, bias, relu=number < layers))
        out = inputs.pop()
        ctx.layers = layers
        ctx.save_for_backward(*inputs, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # that is, with create_graph
            raise RuntimeError("oneDNN's linear layers have no second derivative; set kernels.dense to torch for one")
        layers: int = ctx.layers
        inputs, weights = ctx.saved_tensors[:layers], ctx.saved_tensors[layers:]
        edges = zip(ctx.needs_input_grad[1:], ctx.next_functions[1:], strict=True)
        needs = [needed and _reached(node) for needed, (node, _) in edges]
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[0], needs[:layers], needs[layers:]
        of_weight: list[Tensor | None] = [None] * layers
        of_bias: list[Tensor | None] = [None] * layers
        for i in reversed(range(layers)):
            if needs_weight[i]:
                of_weight[i] = _product(grad.t(), inputs[i].t())
            if needs_bias[i]:
                of_bias[i] = grad.sum(0)
            if not (needs_x or any(needs_weight[:i]) or any(needs_bias[:i])):
                return (None, *of_weight, *of_bias)
            grad = _product(grad, weights[i].t())
            if i > 0:
                torch.ops.aten.threshold_backward.grad_input(grad, inputs[i], 0, grad_input=grad)  # in place
        return (grad, *of_weight, *of_bias)

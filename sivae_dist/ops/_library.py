"""The namespace `torch.ops.sivae`: what all fused operators share on the Python side.

The operators are declared here in Python, with shapes for tracing (fakes) and derivatives; the libraries built from
`kernels/` add what runs on tensors. Declared without a library loaded, an operator cannot be called, only traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sivae_dist.errors import UserError

NAMESPACE = "sivae"
SCHEMAS: dict[str, str] = {}
_KEPT: list[Any] = []  # a library's declarations live as long as it does
_LIBRARY: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


def define(name: str, schema: str, fake: Callable[..., Any]) -> None:
    """Declares an operator: its name, `(arguments) -> results`, and the function that makes empty results."""
    SCHEMAS[name] = schema
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)


def define_emulated() -> None:
    """Declares all operators once more, in the namespace of the CUDA kernels that run on the CPU (for tests)."""
    if _KEPT:
        return
    library: Any = torch.library.Library(f"{NAMESPACE}_emulated", "DEF")  # type: ignore[no-untyped-call]
    for name, schema in SCHEMAS.items():
        library.define(f"{name}{schema}")
    _KEPT.append(library)


def derivative(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """The operator's derivative, as `torch.library.register_autograd` takes it."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup, lib=_LIBRARY)


def no_derivative(name: str) -> None:
    """Makes the derivative of a backward operator a clear error instead of a wrong number."""

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise UserError(
            f"the fused kernels have no second derivative ({name})",
            "set kernels.mode to reference (or SIVAE_KERNELS=reference) for losses that need one, gradient penalties",
        )

    derivative(name, lambda ctx, inputs, output: None, refuse)


def wide_dtype(x: Tensor) -> torch.dtype:
    """What the kernels compute in: float32, for float64 that."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32

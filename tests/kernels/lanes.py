"""The builds that run here, called in the same way: the CPU kernels, and the CUDA kernels where there is a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# Against float64: the input has the type already, so this is rounding of sums of some 16 products and of the result.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@dataclass(frozen=True)
class Lane:
    """One build: the mode that selects it, the device of its tensors, the namespace of its operators."""

    mode: str
    device: str
    namespace: str = "sivae"

    @property
    def ops(self) -> Any:
        return getattr(torch.ops, self.namespace)

    def put(self, x: Tensor, dtype: torch.dtype | None = None, layout: Any = None) -> Tensor:
        x = x.to(self.device, dtype or x.dtype)
        return x if layout is None else x.contiguous(memory_format=layout)


LANES = [
    pytest.param(Lane("cpu", "cpu"), id="cpu"),
    pytest.param(Lane("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu),
]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: Tensor, wanted: Tensor, size: float | None = None) -> None:
    """Equal to float64 within the type's tolerance, in units of the largest number (or `size`)."""
    tolerance = TOLERANCE[found.dtype] * (size or max(1.0, wanted.abs().max().item() if wanted.numel() else 1.0))
    torch.testing.assert_close(found.double().cpu(), wanted.double().cpu(), rtol=0.0, atol=tolerance)


def devices(monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int]]) -> None:
    """Makes torch say that CUDA devices of these compute capabilities are visible."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])

"""Mixed precision with float32 islands: networks may compute in 16 bits, objectives never do."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sivae_dist.errors import UserError
from sivae_dist.models import Autoencoder, DecoderDraws, Posterior
from sivae_dist.objectives import Players

Dtype = Literal["fp32", "bf16", "fp16"]
Drawing = Callable[[str, bool], DecoderDraws]  # (name of the draw that made z, z is from the prior)


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats of the networks' computations. Weights and optimizer state are float32 always."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto follows `accelerate launch --mixed_precision` (fp32 without it). fp16 scales the losses, see below."""
    loss_scale: float = 65536.0
    """fp16: what losses are multiplied by at first, so that small gradients do not vanish. Halved after an overflow."""
    loss_scale_steps: int = 2000
    """fp16: after this many steps of a player without overflow its scale doubles."""
    channels_last: bool = True
    """Store images and convolution weights with channels innermost: faster on CPUs and on tensor cores."""
    tf32: bool = False
    """Allow TF32 matrix products in float32 computations on CUDA devices."""

    def __post_init__(self) -> None:
        if not 1 <= self.loss_scale < math.inf or math.frexp(self.loss_scale)[0] != 0.5 or self.loss_scale_steps < 1:
            raise UserError(
                f"precision: loss_scale {self.loss_scale}, loss_scale_steps {self.loss_scale_steps} are not in range",
                "loss_scale must be a power of two (scaling by it rounds nothing), loss_scale_steps at least 1",
            )

    def resolved(self) -> Dtype:
        """The dtype with `auto` resolved. Raises UserError for a launcher setting that is not supported."""
        if self.dtype != "auto":
            return self.dtype
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched == "bf16":
            return "bf16"
        if launched == "fp16":
            return "fp16"
        if launched == "no":
            return "fp32"
        raise UserError(
            f"accelerate asks for mixed precision {launched!r}; supported are 'no', 'bf16' and 'fp16'",
            "launch with --mixed_precision bf16 (or no, fp16), or set precision.dtype",
        )


class Precision:
    """Wraps networks so that they run under autocast and return at least float32."""

    def __init__(self, dtype: Dtype = "fp32", device_type: str = "cpu") -> None:
        self.dtype, self.device_type = dtype, device_type

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which networks, and nothing else, are called."""
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.device_type, dtype=torch.bfloat16 if self.dtype == "bf16" else torch.float16)

    def players(
        self,
        model: Autoencoder,
        condition: Tensor | None = None,
        watch: Callable[[Posterior], None] | None = None,
        *,
        drawing: Drawing | None = None,
    ) -> Players:
        """The model's networks as objectives see them: autocast inside, float32 (or float64) outside.

        watch:   is shown every posterior on its way out.
        drawing: where a stochastic decoder's randomness comes from; None decodes without any.
        """

        def encoder(x: Tensor) -> Posterior:
            with self.autocast():
                posterior = model.encoder(x, condition)
            posterior = Posterior(wide(posterior.mu), wide(posterior.logvar))
            if watch is not None:
                watch(posterior)
            return posterior

        def decoder(z: Tensor, name: str = "", *, from_prior: bool = False) -> Tensor:
            draws = (drawing(name, from_prior) if drawing else None,) if model.stochastic else ()
            with self.autocast():
                x_hat = model.decoder(z, condition, *draws)
            return wide(x_hat)

        return Players(encoder, decoder, model.prior)


def wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

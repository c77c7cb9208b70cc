"""The operators at the shapes of the 256 and 1024 px recipes (configs/ffhq*_modulated.yaml).

Costs: `bytes` counts every input once and every output once; with the backward pass the gradient of the output, what
the derivative needs and the gradient of the input as well. Small tensors (filters, biases) do not count.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sivae_dist.apps.bench import fused
from sivae_dist.apps.bench.core import Case, Ceiling, Result, ceiling, measure
from sivae_dist.apps.bench.setting import RESOLUTIONS, Setting, both
from sivae_dist.errors import UserError
from sivae_dist.ops import bias_act, kernels, setup_filter, upfirdn2d
from sivae_dist.ops.bias_act import bias_act_reference
from sivae_dist.ops.upfirdn2d import upfirdn2d_reference

__all__ = ["RESOLUTIONS", "Setting", "cases", "run"]


def cases(setting: Setting) -> Iterator[Case]:
    """All cases. An operator adds its own generator here."""
    for resolution in setting.px:
        channels = RESOLUTIONS[resolution]
        yield from _upfirdn2d(setting, resolution, channels)
        yield from _bias_act(setting, resolution, channels)
        yield from fused.cases(setting, resolution, channels)


def run(setting: Setting, wanted: str, seconds: float) -> tuple[Ceiling, list[Result]]:
    """Measures the cases whose operator and name contain `wanted`. Raises UserError when the kernels cannot be had."""
    mode: kernels.Mode = "cuda" if setting.device.type == "cuda" else "cpu"
    with kernels.using(mode):
        if not kernels.serves(setting.device.type):
            raise UserError("the environment variable SIVAE_KERNELS keeps the kernels from running", "unset it")
        chosen = [case for case in cases(setting) if wanted in f"{case.operator} {case.name}"]
        if not chosen:
            names = sorted({case.operator for case in cases(setting)})
            raise UserError(f"no case contains {wanted!r}", f"--only takes a part of a name, such as {names[0]}")
        limits = ceiling(setting.device, setting.dtype)
        return limits, [measure(case, setting.device, seconds) for case in chosen]


def _upfirdn2d(s: Setting, resolution: int, channels: int) -> Iterator[Case]:
    taps = setup_filter([1, 3, 3, 1]).to(s.device)
    half = resolution // 2
    shapes = [
        ("up", (channels, half), 2, 1, (2, 1, 2, 1)),
        ("down", (channels, resolution), 1, 2, (1, 1, 1, 1)),
        ("blur", (channels, resolution + 1), 1, 1, (1, 1, 1, 1)),
        ("up RGB", (3, half), 2, 1, (2, 1, 2, 1)),
    ]
    for name, (maps, size), up, down, sides in shapes:
        shape = (s.images(resolution), maps, size, size)
        out = (size * up + sum(sides[:2]) - 4) // down + 1
        moved = shape[0] * maps * (size**2 + out**2) * s.dtype.itemsize
        flops = 2 * shape[0] * maps * out**2 * (2 * 4 // up)  # separable, without the taps that meet zeros

        def ours(x: Tensor, up: int = up, down: int = down, sides: tuple[int, ...] = sides) -> Tensor:
            return upfirdn2d(x, taps, up, down, sides, gain=float(up * up))

        def plain(x: Tensor, up: int = up, down: int = down, sides: tuple[int, ...] = sides) -> Tensor:
            return upfirdn2d_reference(x, taps, up, down, sides, gain=float(up * up))

        label = f"{resolution} px {name} {shape[0]}x{maps}x{size}x{size}"
        yield from both(s, "upfirdn2d", label, [shape], ours, plain, moved, flops, 2 * moved)


def _bias_act(s: Setting, resolution: int, channels: int) -> Iterator[Case]:
    bias, strength = torch.randn(channels, device=s.device), torch.tensor(0.3, device=s.device)
    shape = (s.images(resolution), channels, resolution, resolution)
    size = shape[0] * channels * resolution**2
    noise = torch.randn(shape[0], 1, resolution, resolution, device=s.device)
    bias.requires_grad_()
    strength.requires_grad_()

    def ours(x: Tensor) -> Tensor:
        return bias_act(x, bias, noise, strength)

    def plain(x: Tensor) -> Tensor:
        return bias_act_reference(x, bias, noise, strength)

    forward = 2 * size * s.dtype.itemsize + noise.nbytes
    backward = 3 * size * s.dtype.itemsize + noise.nbytes
    label = f"{resolution} px noise, lrelu {shape[0]}x{channels}x{resolution}x{resolution}"
    yield from both(s, "bias_act", label, [shape], ours, plain, forward, 6 * size, forward + backward)

"""The fused blocks at the shapes of the 256 and 1024 px recipes.

`bytes` counts, as for the other operators, every map once that must be read or written: the floor of a kernel that
holds a channel on the chip. The norms read their input twice and cannot reach the copy rate; see kernels/*/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sivae_dist.apps.bench.core import Case
from sivae_dist.apps.bench.setting import Setting, both
from sivae_dist.ops import adain_act, modulated_layer, norm_act, setup_filter, upfirdn2d
from sivae_dist.ops._fused_modulated import fused_epilogue
from sivae_dist.ops._fused_modulated_fir import fused_fir_epilogue
from sivae_dist.ops.adain_act import adain_act_reference
from sivae_dist.ops.bias_act import bias_act_reference
from sivae_dist.ops.modulated_conv2d import modulated_conv2d_reference
from sivae_dist.ops.modulated_layer import ALPHA, GAIN, epilogue_reference
from sivae_dist.ops.norm_act import Resample, norm_act_reference
from sivae_dist.ops.upfirdn2d import upfirdn2d_reference


def cases(s: Setting, resolution: int, channels: int) -> Iterator[Case]:
    """All of this file."""
    yield from _adain_act(s, resolution, channels)
    yield from _norm_act(s, resolution, channels)
    yield from _modulated_fir(s, resolution, channels)
    yield from _modulated_layer(s, resolution, channels)


def _learnt(s: Setting, *shape: int) -> Tensor:
    return torch.randn(shape, device=s.device).requires_grad_()


def _adain_act(s: Setting, resolution: int, channels: int) -> Iterator[Case]:
    batch = s.images(resolution)
    shape = (batch, channels, resolution, resolution)
    noise = torch.randn(batch, 1, resolution, resolution, device=s.device)
    beside = (noise, _learnt(s, channels), _learnt(s, channels), _learnt(s, batch, 2 * channels))
    size = batch * channels * resolution**2

    def ours(x: Tensor) -> Tensor:
        return adain_act(x, *beside)[0]

    def plain(x: Tensor) -> Tensor:
        return adain_act_reference(x, *beside)[0]

    forward, backward = ((n * size * s.dtype.itemsize + noise.nbytes) for n in (2, 3))
    label = f"{resolution} px noise, style {batch}x{channels}x{resolution}x{resolution}"
    yield from both(s, "adain_act", label, [shape], ours, plain, forward, 12 * size, forward + backward)


def _norm_act(s: Setting, resolution: int, channels: int) -> Iterator[Case]:
    batch = s.images(resolution)
    shape = (batch, channels, resolution, resolution)
    size = batch * channels * resolution**2
    ways: tuple[tuple[Resample, float], ...] = (("none", 1.0), ("down", 0.25))
    for resample, part in ways:
        norm = nn.BatchNorm2d(channels).to(s.device)

        def ours(x: Tensor, skip: Tensor, norm: nn.Module = norm, resample: Resample = resample) -> Tensor:
            return norm_act(x, norm, skip, resample=resample)

        def plain(x: Tensor, skip: Tensor, norm: nn.Module = norm, resample: Resample = resample) -> Tensor:
            return norm_act_reference(x, norm, skip, resample=resample)

        forward, backward = (int((n + part) * size * s.dtype.itemsize) for n in (2, 4))
        label = f"{resolution} px batch norm, skip, {resample} {batch}x{channels}x{resolution}x{resolution}"
        yield from both(s, "norm_act", label, [shape, shape], ours, plain, forward, 10 * size, forward + backward)


def _modulated_fir(s: Setting, resolution: int, channels: int) -> Iterator[Case]:
    """What follows a transposed convolution: filter and epilogue in one pass, and in one pass each."""
    batch = s.images(resolution)
    taps, sides = setup_filter([1, 3, 3, 1]).to(s.device), (1, 1, 1, 1)
    noise = torch.randn(batch, 1, resolution, resolution, device=s.device)
    scale, bias = _learnt(s, batch, channels), _learnt(s, channels)
    beside = (scale, noise, torch.tensor(0.3, device=s.device, requires_grad=True), bias, None)
    numbers = (ALPHA, GAIN, 256.0, True)
    shape = torch.Size((batch, channels, resolution + 1, resolution + 1))

    def ours(x: Tensor) -> Tensor:
        return _first(fused_fir_epilogue(x, taps, sides, False, 4.0, *beside, *numbers))

    def apart(x: Tensor) -> Tensor:
        return _first(fused_epilogue(upfirdn2d(x, taps, 1, 1, sides, gain=4.0), *beside, *numbers))

    def plain(x: Tensor) -> Tensor:
        u = upfirdn2d_reference(x, taps, 1, 1, sides, gain=4.0)
        return _first(epilogue_reference(u, *beside, 256.0, plain=True))

    size = batch * channels * resolution**2
    maps = (size + shape.numel()) * s.dtype.itemsize + noise.nbytes
    label = f"{resolution} px filter, noise {batch}x{channels}x{resolution + 1}x{resolution + 1}"
    backward = maps + shape.numel() * s.dtype.itemsize  # reads the map and a gradient, writes one
    others = {"two passes": apart}
    yield from both(s, "modulated_fir", label, [shape], ours, plain, maps, 22 * size, maps + backward, others)


def _first(results: tuple[Tensor | None, Tensor | None]) -> Tensor:
    assert results[0] is not None
    return results[0]


def _modulated_layer(s: Setting, resolution: int, channels: int) -> Iterator[Case]:
    """Twice: from half the size, with the filter, and at full size. `bytes`: the layer's input and output."""
    batch = s.images(resolution)
    for up, width_in in ((2, 2 * channels), (1, channels)):
        half = resolution // up
        fir = setup_filter([1, 3, 3, 1]).to(s.device) if up > 1 else None
        weight, styles = _learnt(s, channels, width_in, 3, 3), _learnt(s, batch, width_in)
        bias, strength = _learnt(s, channels), torch.tensor(0.3, device=s.device, requires_grad=True)
        noise = torch.randn(batch, 1, resolution, resolution, device=s.device)

        def ours(
            x: Tensor,
            given: tuple[Tensor, ...] = (weight, styles, bias, noise, strength),
            up: int = up,
            fir: Tensor | None = fir,
        ) -> Tensor:
            y, _ = modulated_layer(x, *given, up=up, padding=1, resample_filter=fir, clamp=256.0)
            assert y is not None
            return y

        def plain(
            x: Tensor,
            given: tuple[Tensor, ...] = (weight, styles, bias, noise, strength),
            up: int = up,
            fir: Tensor | None = fir,
        ) -> Tensor:
            y = modulated_conv2d_reference(x, given[0], given[1], None, up, 1, 1, fir)
            return bias_act_reference(y, given[2], given[3], given[4], clamp=256.0)

        pixels = batch * resolution**2
        maps = batch * width_in * half**2 + channels * pixels
        flops = 2 * 9 * width_in * channels * batch * half**2
        moved = maps * s.dtype.itemsize
        label = f"{resolution} px x{up} {batch}x{width_in}x{half}x{half}"
        shape = (batch, width_in, half, half)
        yield from both(s, "modulated_layer", label, [shape], ours, plain, moved, flops, 2 * moved)

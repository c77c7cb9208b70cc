"""The operators beyond recorded numbers: definitions, types, layouts, sizes, gradients, bad arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sivae_dist.ops import (
    bias_act,
    conv2d_resample,
    downsample2d,
    modulated_conv2d,
    setup_filter,
    upfirdn2d,
    upsample2d,
)

FILTER = setup_filter([1, 3, 3, 1])
HALVES = [torch.float16, torch.bfloat16]
EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # spacing of numbers just above one


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_hand(x: Tensor, f: Tensor, up: int, down: int, sides: tuple[int, ...], flip: bool, gain: float) -> Tensor:
    """upfirdn2d pixel by pixel."""
    left, right, top, bottom = sides
    height, width = x.shape[2] * up + top + bottom, x.shape[3] * up + left + right
    u = torch.zeros(*x.shape[:2], height, width, dtype=x.dtype)
    for i in range(height):
        for j in range(width):
            (row, r), (column, c) = divmod(i - top, up), divmod(j - left, up)
            if r == c == 0 and 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                u[:, :, i, j] = x[:, :, row, column]
    g = f if flip else f.flip(0, 1)
    rows, columns = range(0, height - f.shape[0] + 1, down), range(0, width - f.shape[1] + 1, down)
    y = torch.zeros(*x.shape[:2], len(rows), len(columns), dtype=x.dtype)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            patch = u[:, :, row : row + f.shape[0], column : column + f.shape[1]]
            y[:, :, i, j] = gain * (patch * g).sum(dim=(2, 3))
    return y


@pytest.mark.parametrize(
    ("up", "down", "sides", "flip"),
    [
        (1, 1, (0, 0, 0, 0), False),
        (2, 1, (2, 1, 2, 1), True),
        (1, 2, (1, 1, 1, 1), False),
        (3, 2, (-1, 4, 3, -2), True),
    ],
)
def test_upfirdn_follows_its_formula(up: int, down: int, sides: tuple[int, ...], flip: bool) -> None:
    x, f = noise(2, 3, 5, 7), noise(4, 3, seed=1)
    found = upfirdn2d(x, f, up, down, sides, flip, 1.7)
    torch.testing.assert_close(found, by_hand(x, f, up, down, sides, flip, 1.7), rtol=1e-12, atol=1e-12)


def test_one_dimensional_taps_act_along_both_axes() -> None:
    x, taps = noise(1, 2, 6, 5), noise(3, seed=1)
    one, two = (upfirdn2d(x, f, 2, 3, (2, 1), gain=2.5) for f in (taps, torch.outer(taps, taps)))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_resampling_keeps_a_constant_and_the_centre() -> None:
    """Inside: the border sees zeros. The centre of mass of a dot stays where it is, in units of the image."""
    x = torch.full((1, 1, 8, 8), 3.0)
    for y in (upsample2d(x, FILTER), downsample2d(x, FILTER)):
        torch.testing.assert_close(y[:, :, 1:-1, 1:-1], torch.full_like(y[:, :, 1:-1, 1:-1], 3.0))
    dot = functional.pad(torch.ones(1, 1, 2, 1), (5, 2, 2, 4))
    for y, factor in ((upsample2d(dot, FILTER), 2.0), (downsample2d(dot, FILTER), 0.5)):
        rows = (y.sum(dim=3) * (torch.arange(y.shape[2]) + 0.5)).sum() / y.sum()
        columns = (y.sum(dim=2) * (torch.arange(y.shape[3]) + 0.5)).sum() / y.sum()
        assert float(rows) == pytest.approx(3.0 * factor) and float(columns) == pytest.approx(5.5 * factor)


def test_filters_commute_with_shifts() -> None:
    """Shifting the input by one pixel shifts the doubled map by two, and vice versa."""
    x = functional.pad(noise(1, 2, 4, 4), (3, 3, 3, 3))
    rolled = x.roll((1, 2), dims=(2, 3))
    torch.testing.assert_close(upsample2d(rolled, FILTER), upsample2d(x, FILTER).roll((2, 4), dims=(2, 3)))
    even = x.roll((2, 2), dims=(2, 3))
    torch.testing.assert_close(downsample2d(even, FILTER), downsample2d(x, FILTER).roll((1, 1), dims=(2, 3)))


def test_convolution_and_filter_in_two_steps() -> None:
    """Up: filter, then convolve; down: convolve, then filter. The other way round, so equal but for the border."""
    x, weight = noise(2, 3, 8, 8), noise(4, 3, 3, 3, seed=1)
    up = conv2d_resample(x, weight, FILTER, up=2, padding=1)
    two_steps = functional.conv2d(upsample2d(x, FILTER), weight, padding=1)
    assert up.shape == two_steps.shape
    torch.testing.assert_close(up[:, :, 2:-2, 2:-2], two_steps[:, :, 2:-2, 2:-2], rtol=1e-12, atol=1e-12)
    down = conv2d_resample(x, weight, FILTER, down=2, padding=1)
    two_steps = downsample2d(functional.conv2d(x, weight, padding=1), FILTER)
    assert down.shape == (2, 4, 4, 4)
    torch.testing.assert_close(down[:, :, 1:-1, 1:-1], two_steps[:, :, 1:-1, 1:-1], rtol=1e-12, atol=1e-12)


# ---- modulated convolution -----------------------------------------------------------------------------------------


def weights_per_sample(x: Tensor, weight: Tensor, styles: Tensor, *, demodulate: bool) -> Tensor:
    """The definition: every sample with its own weights."""
    own = weight[None] * styles[:, None, :, None, None]
    if demodulate:
        own = own * torch.rsqrt(own.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8)
    return torch.cat([functional.conv2d(x[b : b + 1], own[b], padding=weight.shape[2] // 2) for b in range(len(x))])


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_modulation_is_a_convolution_with_own_weights(demodulate: bool, size: float) -> None:
    """Values and gradients, also where the 1e-8 under the root matters and where styles are huge."""
    inputs = [noise(3, 4, 5, 6), noise(2, 4, 3, 3, seed=1) * size, noise(3, 4, seed=2)]
    ours, plain = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    y = modulated_conv2d(*ours, padding=1, demodulate=demodulate)
    expected = weights_per_sample(*plain, demodulate=demodulate)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12 * size)
    dy = noise(*y.shape, seed=3)
    for a, b in zip(torch.autograd.grad(y, ours, dy), torch.autograd.grad(expected, plain, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * float(b.abs().max()))


def test_demodulation_gives_unit_variance() -> None:
    x = noise(64, 32, 16, 16, dtype=torch.float32)
    y = modulated_conv2d(x, noise(8, 32, 3, 3, seed=1) * 7, noise(64, 32, seed=2) + 3, padding=1)
    inside = y[:, :, 1:-1, 1:-1]
    assert float(inside.var()) == pytest.approx(1.0, abs=0.03)
    assert (
        float(modulated_conv2d(x, noise(8, 32, 3, 3, seed=1) * 7, noise(64, 32, seed=2), demodulate=False).var()) > 99
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 3e4])
def test_half_precision_neither_overflows_nor_vanishes(dtype: torch.dtype, size: float) -> None:
    """Styles and weights up to half precision's largest number; the formula itself would overflow."""
    inputs = [noise(2, 64, 9, 7), noise(5, 64, 3, 3, seed=1) * size / 4, noise(2, 64, seed=2) * size / 4]
    x, weight, styles = (t.to(dtype) for t in inputs)
    expected = modulated_conv2d(x.double(), weight.double(), styles.double(), padding=1)
    leaves = [t.clone().requires_grad_() for t in (x, weight.float(), styles.float())]
    y = modulated_conv2d(*leaves, padding=1)
    assert y.dtype == dtype
    # A sum of 576 products of numbers rounded to half precision, of standard deviation one.
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=8 * EPS[dtype])
    for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert gradient.dtype == leaf.dtype and bool(gradient.isfinite().all())


def test_zero_and_constant_inputs_have_gradients() -> None:
    weight, styles = noise(3, 4, 3, 3, seed=1), noise(2, 4, seed=2)
    for x, s in ((torch.zeros(2, 4, 5, 5), styles), (torch.ones(2, 4, 5, 5), styles), (noise(2, 4, 5, 5), styles * 0)):
        leaves = [t.double().clone().requires_grad_() for t in (x, weight, s)]
        gradients = torch.autograd.grad(modulated_conv2d(*leaves, padding=1).square().sum(), leaves)
        assert all(bool(g.isfinite().all()) for g in gradients)


# ---- every operator ------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "upfirdn2d": lambda x: upfirdn2d(x, FILTER, 2, 3, (2, 1, -1, 2), gain=1.3),
    "separable": lambda x: upfirdn2d(x, setup_filter([1, 2, 1], separable=True), padding=1),
    "no filter": lambda x: upfirdn2d(x, None, 1, 2, 1),
    "bias_act": lambda x: bias_act(
        x, noise(3, seed=5, dtype=torch.float32), noise(1, 1, *x.shape[2:], seed=6), torch.tensor(0.3), clamp=1.5
    ),
    "swish": lambda x: bias_act(x, act="swish"),
    "modulated": lambda x: modulated_conv2d(
        x, noise(4, 3, 3, 3, seed=1).to(x), noise(len(x), 3, seed=2), noise(1, 1, *x.shape[2:], seed=3), padding=1
    ),
    "modulated up": lambda x: modulated_conv2d(
        x, noise(4, 3, 3, 3, seed=1).to(x), noise(len(x), 3, seed=2), up=2, padding=1, resample_filter=FILTER
    ),
    "modulated down": lambda x: modulated_conv2d(
        x, noise(4, 3, 3, 3, seed=1).to(x), noise(len(x), 3, seed=2), down=2, padding=1, resample_filter=FILTER
    ),
    "grouped": lambda x: conv2d_resample(x, noise(6, 1, 3, 3, seed=1).to(x), FILTER, up=2, padding=1, groups=3),
}
every = pytest.mark.parametrize("call", list(CALLS.values()), ids=list(CALLS))


@every
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_types(call: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """The result has the input's type; it deviates from the double one by rounding of inputs, products and result."""
    x = noise(2, 3, 7, 5, dtype=dtype)
    y, expected = call(x), call(x.double())
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 8 * EPS[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@every
def test_layouts_and_the_empty_batch(call: Callable[[Tensor], Tensor]) -> None:
    x = noise(2, 3, 7, 5)
    y = call(x)
    last = call(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, y, rtol=1e-12, atol=1e-12)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(call(x.transpose(2, 3).contiguous().transpose(2, 3)), y, rtol=1e-12, atol=1e-12)
    empty = x[:0].clone().requires_grad_()
    assert call(empty).shape == (0, *y.shape[1:])
    call(empty).sum().backward()
    assert empty.grad is not None and empty.grad.shape == empty.shape


@every
def test_gradients(call: Callable[[Tensor], Tensor]) -> None:
    x = noise(1, 3, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(call, (x,))
    assert torch.autograd.gradgradcheck(call, (x,))


def test_gradients_of_all_inputs() -> None:
    x, bias, maps, strength = noise(2, 3, 3, 2), noise(3, seed=1), noise(2, 1, 3, 2, seed=2), noise(1, seed=3)[0]
    inputs = [t.requires_grad_() for t in (x, bias, maps, strength)]
    for act in ("linear", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish"):
        assert torch.autograd.gradcheck(lambda *a, act=act: bias_act(*a, act=act, clamp=2.0), inputs)
    weight, styles = noise(2, 3, 3, 3, seed=4).requires_grad_(), noise(2, 3, seed=5).requires_grad_()
    for options in (
        {"noise": maps, "padding": 1},
        {"up": 2, "resample_filter": FILTER, "padding": 1},
        {"demodulate": False, "padding": 1},
    ):
        function = lambda *a, options=options: modulated_conv2d(*a, **options)  # noqa: E731
        assert torch.autograd.gradcheck(function, [x, weight, styles])
        assert torch.autograd.gradgradcheck(function, [x, weight, styles])


@pytest.mark.parametrize("device_type", ["cpu"])
def test_autocast_reaches_the_convolution_only(device_type: str) -> None:
    x, weight, styles = (noise(*s, dtype=torch.float32) for s in ((2, 3, 6, 6), (4, 3, 3, 3), (2, 3)))
    with torch.autocast(device_type, dtype=torch.bfloat16):
        assert modulated_conv2d(x, weight, styles).dtype == torch.bfloat16
        assert torch.equal(upfirdn2d(x, FILTER), upfirdn2d(x, FILTER)) and upfirdn2d(x, FILTER).dtype == x.dtype
        inside = upfirdn2d(x, FILTER), bias_act(x, act="softplus")
    assert torch.equal(inside[0], upfirdn2d(x, FILTER)) and torch.equal(inside[1], bias_act(x, act="softplus"))


MAP, WEIGHT, STYLES = torch.zeros(2, 3, 4, 5), torch.zeros(6, 3, 3, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: upfirdn2d(MAP[0], None), r"\(3, 4, 5\), expected a floating \(B, C, H, W\)"),
        (lambda: upfirdn2d(MAP.int(), None), "torch.int32"),
        (lambda: upfirdn2d(MAP, FILTER[None]), r"f is .*\(1, 4, 4\)"),
        (lambda: upfirdn2d(MAP, FILTER, up=0), "up is 0, expected"),
        (lambda: upfirdn2d(MAP, FILTER, down=(1, 2, 3)), r"down is \(1, 2, 3\)"),
        (lambda: upfirdn2d(MAP, FILTER, padding=(1, 2, 3)), r"padding is \(1, 2, 3\)"),
        (lambda: upfirdn2d(MAP, FILTER, padding=(0, 0, -2, 0)), "does not fit"),
        (lambda: setup_filter([]), "taps of shape"),
        (lambda: setup_filter(FILTER, separable=True), "cannot be separable"),
        (lambda: bias_act(MAP, torch.zeros(2)), r"bias has shape \(2,\), expected \(3,\)"),
        (lambda: bias_act(MAP, noise=torch.zeros(1, 1, 4, 5)), "come together"),
        (lambda: bias_act(MAP, None, torch.zeros(1, 1, 5, 4), torch.tensor(1.0)), "noise has shape"),
        (lambda: bias_act(MAP, None, torch.zeros(1, 1, 4, 5), torch.zeros(1)), r"\(1,\), expected one number"),
        (lambda: bias_act(MAP, act="gelu"), "act is 'gelu', expected one of linear"),
        (lambda: bias_act(MAP, clamp=-1.0), "clamp is -1"),
        (lambda: modulated_conv2d(MAP, WEIGHT[:, :2], STYLES), r"weight has shape \(6, 2, 3, 3\)"),
        (lambda: modulated_conv2d(MAP, WEIGHT, STYLES[:1]), r"styles have shape \(1, 3\), expected \(2, 3\)"),
        (lambda: modulated_conv2d(MAP, WEIGHT, STYLES, torch.zeros(2, 4, 5)), "noise has shape"),
        (lambda: modulated_conv2d(MAP, WEIGHT, STYLES, up=0), "up is 0"),
        (lambda: conv2d_resample(MAP, WEIGHT[:, :1], groups=2), "weight has shape"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("gain", [-1.0, 0.0, 2.5])
def test_the_gain_of_separable_taps_has_a_sign(gain: float) -> None:
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    taps = setup_filter([1, 2, 1], separable=True)
    found = upfirdn2d(x, taps, padding=1, gain=gain)
    torch.testing.assert_close(found, gain * upfirdn2d(x, taps, padding=1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, upfirdn2d(x, taps.outer(taps), padding=1, gain=gain), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="gain -1"):
        setup_filter([1, 2, 1], gain=-1, separable=True)

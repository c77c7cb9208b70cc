"""Convolution together with FIR resampling."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from sivae_dist.ops._arguments import Pair, check_filter, check_map, filter_size, four
from sivae_dist.ops.upfirdn2d import same_size, upfirdn2d, upfirdn2d_reference

Fir = Callable[..., Tensor]  # upfirdn2d or its reference


def conv2d_resample(
    x: Tensor,
    weight: Tensor,
    resample_filter: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    groups: int = 1,
    flip_filter: bool = False,
) -> Tensor:
    """A convolution (as PyTorch's: a correlation) after upsampling by `up`, or before downsampling by `down`.

    Upsampling: the map with up - 1 zeros between pixels, convolved, then filtered with gain up^2. Downsampling:
    filtered, then convolved at every down-th pixel. Either way the map counts as surrounded by zeros without end, so
    the order of convolution and filter does not matter; the filter's own padding is added, so that `padding` is the
    one that the convolution alone would need. With both, the filter acts twice: after up, and before every down-th
    pixel is kept. With neither it does not act.

    x: (B, C, H, W); weight: (O, C / groups, height, width); both of one dtype unless autocast is on, which has its say
    on the convolution as usual. resample_filter: see `upfirdn2d`; None filters nothing.
    Returns (B, O, H', W'), H' = (H * up + padding_before + padding_after - height + 1) / down, rounded up.
    Raises ValueError for arguments of another kind.
    """
    check_convolution(x, weight, resample_filter, up, down, groups)
    return conv2d_resample_reference(x, weight, resample_filter, up, down, padding, groups, flip_filter, fir=upfirdn2d)


def check_convolution(
    x: Tensor, weight: Tensor, resample_filter: Tensor | None, up: int, down: int, groups: int = 1
) -> None:
    """Raises ValueError for what makes no convolution."""
    check_map(x)
    check_filter(resample_filter, "resample_filter")
    if weight.ndim != 4 or weight.shape[1] * groups != x.shape[1] or weight.shape[0] % groups:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected (O, {x.shape[1]} / {groups}, height, width), O a "
            f"multiple of {groups}, for x of shape {tuple(x.shape)}"
        )
    for name, factor in (("up", up), ("down", down)):
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"{name} is {factor}, expected an integer, 1 or more")


def conv2d_resample_reference(
    x: Tensor,
    weight: Tensor,
    resample_filter: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    groups: int = 1,
    flip_filter: bool = False,
    *,
    fir: Fir = upfirdn2d_reference,
) -> Tensor:
    """The formula of `conv2d_resample`. Arguments are taken to be right. fir: what filters."""
    f = resample_filter
    if up > 1:
        y, sides = transposed_convolution(x, weight, f, up, down, padding, groups)
        y = fir(y, f, 1, 1, sides, flip_filter, float(up * up))
        return fir(y, f, 1, down, 0, flip_filter, 1.0) if down > 1 else y
    if down > 1:
        sides = same_size(four(padding), filter_size(f), (1, 1), (down, down))
        x = fir(x, f, 1, 1, sides, flip_filter, 1.0)
        return functional.conv2d(x, weight, stride=down, groups=groups)
    left, right, top, bottom = four(padding)
    if left == right and top == bottom and left >= 0 and top >= 0:
        return functional.conv2d(x, weight, padding=(top, left), groups=groups)
    return functional.conv2d(functional.pad(x, (left, right, top, bottom)), weight, groups=groups)


def transposed_convolution(
    x: Tensor, weight: Tensor, f: Tensor | None, up: int, down: int, padding: Pair, groups: int = 1
) -> tuple[Tensor, tuple[int, int, int, int]]:
    """What `conv2d_resample` filters where up > 1, and the padding of that filter (gain up^2)."""
    left, right, top, bottom = same_size(four(padding), filter_size(f), (up, up), (down, down))
    # A transposed convolution is the convolution of the map with zeros in between, with all the border there is:
    # width - 1 pixels before, width - up after. The filter's padding makes up the difference.
    height, width = weight.shape[2:]
    y = functional.conv_transpose2d(x, _transposed(weight, groups), stride=up, groups=groups)
    return y, (left - width + 1, right - width + up, top - height + 1, bottom - height + up)


def _transposed(weight: Tensor, groups: int) -> Tensor:
    """(O, C / groups, h, w) -> the (C, O / groups, h, w), turned round, with which conv_transpose2d does the same."""
    outputs, inputs, height, width = weight.shape
    w = weight.flip(2, 3).reshape(groups, outputs // groups, inputs, height, width)
    return w.transpose(1, 2).reshape(groups * inputs, outputs // groups, height, width)

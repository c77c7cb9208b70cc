"""The operators against the public StyleGAN2 implementation: forward and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden_files import Golden, comparing, files, of
from torch import Tensor

from sivae_dist.models.style.layers import Linear, unit_second_moment
from sivae_dist.ops import (
    bias_act,
    conv2d_resample,
    downsample2d,
    filter2d,
    modulated_conv2d,
    setup_filter,
    upfirdn2d,
    upsample2d,
)
from sivae_dist.ops.bias_act import ACTIVATIONS
from sivae_dist.ops.modulated_conv2d import scale_and_add


def cases(*operators: str) -> list[tuple[str, str]]:
    """(file, case) of the recorded cases of these operators; a case is everything before /in, /cfg or /out."""
    found: dict[tuple[str, str], None] = {}
    for name in of("ops"):
        for key in files()[name].arrays:
            if key.split("/")[0] in operators and "/out/" in key:
                found[name, key.split("/out/")[0]] = None
    return list(found)


def settings(golden: Golden, case: str) -> dict[str, Any]:
    return {name: golden.array(key).tolist() for name, key in golden.under(f"{case}/cfg/").items()}


def compare_case(golden: Golden, case: str, dtype: torch.dtype, function: Callable[..., Tensor]) -> None:
    """function(**inputs by recorded name, **options) and the gradients of sum(dy * y)."""
    inputs = golden.group(f"{case}/in/", dtype)
    inputs |= {name: tensor.float() for name, tensor in inputs.items() if name == "f"}  # filters are always single
    dy = inputs.pop("dy")
    recorded = golden.under(f"{case}/grad/")
    leaves = {name: tensor.requires_grad_(name in recorded) for name, tensor in inputs.items()}
    y = function(**leaves, **settings(golden, case))
    gradients = torch.autograd.grad((dy * y).sum(), [leaves[name] for name in recorded])
    with comparing(golden, dtype) as compare:
        compare.both(f"{case}/out/y", f"{case}/out32/y", y, "forward")
        compare.gradients(f"{case}/grad/", dict(zip(recorded, gradients, strict=True)))


@pytest.mark.parametrize(("name", "case"), cases("setup_filter"))
def test_setup_filter(name: str, case: str) -> None:
    golden = files()[name]
    taps = golden.tensor(f"{case}/in/f", torch.float32) if f"{case}/in/f" in golden else None
    ours = {"normalize": "normalise", "flip_filter": "flip"}
    options = {ours.get(key, key): value for key, value in settings(golden, case).items()}
    with comparing(golden, torch.float32) as compare:
        compare.close(f"{case}/out/f", setup_filter(taps, **options))


@pytest.mark.parametrize(("name", "case"), cases("upfirdn2d", "filter2d", "upsample2d", "downsample2d"))
def test_resampling(name: str, case: str, dtype: torch.dtype) -> None:
    functions = {"upfirdn2d": upfirdn2d, "filter2d": filter2d, "upsample2d": upsample2d, "downsample2d": downsample2d}

    operator = case.split("/", maxsplit=1)[0]

    def run(x: Tensor, f: Tensor | None = None, **options: Any) -> Tensor:
        return functions[operator](x, f, **options)

    compare_case(files()[name], case, dtype, run)


@pytest.mark.parametrize(("name", "case"), cases("bias_act"))
def test_bias_act(name: str, case: str, dtype: torch.dtype) -> None:
    """Ours adds its bias along dimension 1 only; the case that has it elsewhere goes through a transposition."""
    act = case.removeprefix("bias_act/").split("_", maxsplit=1)[0]

    def run(x: Tensor, b: Tensor | None = None, dim: int = 1, **options: Any) -> Tensor:
        return bias_act(x.movedim(dim, 1), b, **({"act": act} | options)).movedim(1, dim)

    compare_case(files()[name], case, dtype, run)


@pytest.mark.parametrize("name", of("ops"))
def test_defaults_of_activations(name: str) -> None:
    golden = files()[name]
    gains, alphas = (golden.under(f"bias_act/default_{what}/") for what in ("gain", "alpha"))
    assert gains.keys() == alphas.keys() == ACTIVATIONS.keys()
    for act, key in gains.items():
        assert ACTIVATIONS[act].gain == golden.value(key)
        assert ACTIVATIONS[act].alpha == golden.value(alphas[act])


@pytest.mark.parametrize(("name", "case"), cases("modulated_conv2d"))
def test_modulated_conv2d(name: str, case: str, dtype: torch.dtype) -> None:
    """fused_modconv chose between two ways to the same map; a kernel for a convolution proper is turned round."""

    def run(weight: Tensor, flip_weight: int = 1, fused_modconv: int = 1, demodulate: int = 1, **rest: Any) -> Tensor:
        return modulated_conv2d(
            weight=weight if flip_weight else weight.flip(2, 3), demodulate=bool(demodulate), **rest
        )

    compare_case(files()[name], case, dtype, run)


@pytest.mark.parametrize(("name", "case"), cases("conv2d_resample"))
def test_conv2d_resample(name: str, case: str, dtype: torch.dtype) -> None:
    def run(x: Tensor, w: Tensor, f: Tensor, flip_weight: bool = True, **options: Any) -> Tensor:
        return conv2d_resample(x, w if flip_weight else w.flip(2, 3), f, **options)

    compare_case(files()[name], case, dtype, run)


@pytest.mark.parametrize(("name", "case"), cases("normalize_2nd_moment", "fma"))
def test_small_parts(name: str, case: str, dtype: torch.dtype) -> None:
    def multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return scale_and_add(a, b, c)

    functions = {"normalize_2nd_moment": unit_second_moment, "fma": multiply_add}
    compare_case(files()[name], case, dtype, functions[case])


@pytest.mark.parametrize(("name", "case"), cases("fully_connected"))
def test_fully_connected(name: str, case: str, dtype: torch.dtype) -> None:
    """Published weights are multiplied when they are used, ours are stored as used; see models/style/layers.py."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, lr_multiplier: float, activation: str) -> Tensor:
        layer = Linear(weight.shape[1], weight.shape[0], gain=1.0, multiplier=lr_multiplier).to(dtype)
        multipliers = layer.own_multipliers()
        used = {"weight": weight * multipliers["weight"], "bias": bias * multipliers["bias"]}
        return bias_act(torch.func.functional_call(layer, used, (x,)), act=activation)

    compare_case(files()[name], case, dtype, run)

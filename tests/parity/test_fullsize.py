"""The published full-size networks: their key layouts, and their outputs with weights from a formula."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from math import prod, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import Golden, comparing, files, key_layouts, left_out, of
from runs import config_for
from torch import Tensor, nn

from sivae_dist.interop import published_keys
from sivae_dist.models import Autoencoder

FAMILIES = ("residual", "introvae", "twod", "style")
LAYOUTS = [name for name, layout in key_layouts()["models"].items() if layout["config"]["family"] in FAMILIES]
CASES = [
    (file, network)
    for file in of("fullsize")
    for network in sorted({key.split("/")[0] for key in files()[file].arrays} - {"cfg"})
    if not left_out(file, f"{network}/x")
]


def _shapes(layout: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape, _, _ in layout["state_dict"]}


@pytest.mark.parametrize("network", LAYOUTS)
def test_key_layout(network: str) -> None:
    """Every published entry has its counterpart of equal shape, and nothing of ours is left over."""
    layout = key_layouts()["models"][network]
    config, family = layout["config"], layout["config"]["family"]
    shapes = _shapes(layout)
    with torch.device("meta"):
        model = config_for(family, shapes).build()
    latent = next(config[name] for name in ("zdim", "hdim", "latent_size") if name in config)
    assert model.prior.shape == (latent,)
    if family == "style":
        assert (model.levels, model.sample_shape[0]) == (config["layer_count"], config["channels"])
    elif family != "twod":
        assert model.sample_shape == (config["cdim"], config["image_size"], config["image_size"])
    ours = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert published_keys.to_ours(family, shapes) == ours
    parameters = [key for key, _, _, kind in layout["state_dict"] if kind == "parameter"]
    dropped = sum(prod(shapes[name]) for name in parameters if published_keys.is_dropped(family, name))
    assert sum(p.numel() for p in model.parameters()) + dropped == layout["n_parameters"]


# ---- weights from the formula ----------------------------------------------------------------------------------------


def uniform(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """u in [0, 1) of every element of a tensor called `name`: SplitMix64 of (seed, name, 1-based index)."""
    start = (seed * 0x9E3779B97F4A7C15 + zlib.crc32(name.encode()) * 0xBF58476D1CE4E5B9) % 2**64
    with np.errstate(over="ignore"):
        h = np.arange(1, prod(shape) + 1, dtype=np.uint64) * np.uint64(0x94D049BB133111EB) + np.uint64(start)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h ^= h >> np.uint64(31)
    return ((h >> np.uint64(11)).astype(np.float64) / 2.0**53).reshape(shape)


def spread(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(a, b) of value = a + b (2u - 1)."""
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "running_mean" or leaf.startswith("bias"):
        return 0.0, 0.1
    if leaf.startswith("noise_weight"):
        return 0.0, 0.1
    if leaf == "buff":
        return 0.0, 0.2
    if leaf in ("running_var", "const"):
        return 1.0, 0.5
    assert leaf == "weight", key
    return (1.0, 0.3) if len(shape) == 1 else (0.0, sqrt(3 / prod(shape[1:])))


def from_formula(seed: int, name: str, shape: tuple[int, ...], a: float, b: float) -> np.ndarray:
    return (a + b * (2 * uniform(seed, name, shape) - 1)).astype(np.float32)


def fill(model: nn.Module, family: published_keys.Family, layout: dict[str, Any], seed: int) -> Iterator[np.ndarray]:
    """Overwrites every entry in the published order; yields the values."""
    shapes, state = _shapes(layout), model.state_dict()
    table = published_keys.names(family, shapes)
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked") or key not in table:
            continue
        values = from_formula(seed, key, shape, *spread(key, shape))
        state[table[key]].copy_(torch.from_numpy(values))
        yield values


def published_size(file: str, network: str) -> tuple[Golden, Autoencoder, dict[str, Any]]:
    """The network in double precision and evaluation mode, its weights checked against the recorded sum; its config."""
    golden, layout = files()[file], key_layouts()["models"][network]
    family, seed = layout["config"]["family"], golden.value("cfg/seed")
    with torch.device("meta"):  # skips the random initialisation of millions of weights
        model = config_for(family, _shapes(layout)).build()
    model = model.double().eval().to_empty(device="cpu")
    sum_, first = 0.0, None
    with torch.no_grad():
        for values in fill(model, family, layout, seed):
            sum_ += float(np.abs(values).sum(dtype=np.float64))
            first = values.reshape(-1)[:8] if first is None else first
    assert first is not None
    np.testing.assert_array_equal(first, golden.array(f"{network}/first_entry_first8"))
    assert sum_ == pytest.approx(golden.value(f"{network}/weights_abs_sum"), rel=1e-9)
    return golden, model, layout["config"]


def given(golden: Golden, name: str, shape: tuple[int, ...], a: float, b: float) -> Tensor:
    return torch.from_numpy(from_formula(golden.value("cfg/seed"), f"input.{name}", shape, a, b)).double()


@pytest.mark.parametrize(("file", "network"), [case for case in CASES if not case[1].startswith("style_")])
def test_outputs(file: str, network: str) -> None:
    golden, model, config = published_size(file, network)
    size, zdim = config["image_size"], model.prior.shape[0]
    batch = 2 if size <= 32 else 1
    x = given(golden, "x", (batch, config["cdim"], size, size), 0.5, 0.5)
    z = given(golden, "z", (batch, zdim), 0.0, sqrt(3))
    with torch.no_grad(), comparing(golden, torch.float64) as compare:
        q, image = model.encode(x), model.decode(z)
        found = {"mu": q.mu, "logvar": q.logvar} | {f"decode/{k}": v for k, v in _summary(image).items()}
        for name, value in found.items():
            compare.close(f"{network}/out/{name}", value)


@pytest.mark.parametrize(("file", "network"), [case for case in CASES if case[1].startswith("style_")])
def test_outputs_of_the_style_network(file: str, network: str) -> None:
    golden, model, config = published_size(file, network)
    model.decoder.noise = "published_bump"
    finest = config["layer_count"] - 1
    x, x128 = (given(golden, name, (1, 3, size, size), 0.0, 1.0) for name, size in (("x", 256), ("x128", 128)))
    z = given(golden, "z", (1, config["latent_size"]), 0.0, sqrt(3))
    with torch.no_grad(), comparing(golden, torch.float64) as compare:
        style = model.encoder.read_style(x)
        q = model.encoder.posterior(style)
        found = {"enc_out": style[:, None], "mu": q.mu, "logvar": q.logvar, "w": model.decoder.map(z)}
        found |= {f"decode_lod{finest}/{k}": v for k, v in _summary(model.decode(z)).items()}
        model.set_level(finest - 1, 0.5)
        found |= {f"decode_lod{finest - 1}_blend0.5/{k}": v for k, v in _summary(model.decode(z)).items()}
        found[f"enc_out_lod{finest - 1}_blend0.5"] = model.encoder.read_style(x128)[:, None]
        for name, value in found.items():
            compare.close(f"{network}/out/{name}", value)


def _summary(image: Tensor) -> dict[str, Tensor]:
    size = image.shape[-1]
    low = (size - 12) // 2
    return {
        "pool": image if size < 32 else nn.functional.avg_pool2d(image, size // 16),
        "crop": image[..., low : low + 12, low : low + 12],
        "corner": image[..., :6, :6],
        "mean_std": torch.stack([image.mean(), image.std()]),
    }


def test_formula_uses_the_name() -> None:
    one, two = (uniform(1, name, (1000,)) for name in ("a", "b"))
    assert abs(one.mean() - 0.5) < 0.05 and abs(np.corrcoef(one, two)[0, 1]) < 0.15

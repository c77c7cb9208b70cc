"""The published full-size networks: their key layouts, and their outputs with weights from a formula."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from math import prod, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import comparing, files, key_layouts, left_out, of
from runs import config_for
from torch import Tensor, nn

from sivae_dist.interop import published_keys

FAMILIES = ("residual", "introvae", "twod")
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
    assert model.prior.shape == (config.get("zdim", config.get("hdim")),)
    if family != "twod":
        assert model.sample_shape == (config["cdim"], config["image_size"], config["image_size"])
    ours = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert published_keys.to_ours(family, shapes) == ours
    dropped = sum(prod(shapes[name]) for name in published_keys.DROPPED[family])
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
    if leaf == "running_var":
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
        if key.endswith("num_batches_tracked"):
            continue
        values = from_formula(seed, key, shape, *spread(key, shape))
        state[table[key]].copy_(torch.from_numpy(values))
        yield values


@pytest.mark.parametrize(("file", "network"), CASES)
def test_outputs(file: str, network: str) -> None:
    golden, layout = files()[file], key_layouts()["models"][network]
    family, config, seed = layout["config"]["family"], layout["config"], golden.value("cfg/seed")
    with torch.device("meta"):  # skips the random initialisation of millions of weights
        model = config_for(family, _shapes(layout)).build()
    model = model.double().eval().to_empty(device="cpu")
    total, first = 0.0, None
    with torch.no_grad():
        for values in fill(model, family, layout, seed):
            total += float(np.abs(values).sum(dtype=np.float64))
            first = values.reshape(-1)[:8] if first is None else first
    size, zdim = config["image_size"], model.prior.shape[0]
    batch = 2 if size <= 32 else 1
    x = torch.from_numpy(from_formula(seed, "input.x", (batch, config["cdim"], size, size), 0.5, 0.5)).double()
    z = torch.from_numpy(from_formula(seed, "input.z", (batch, zdim), 0.0, sqrt(3))).double()
    with torch.no_grad(), comparing(golden, torch.float64) as compare:
        assert first is not None
        np.testing.assert_array_equal(first, golden.array(f"{network}/first_entry_first8"))
        assert total == pytest.approx(golden.value(f"{network}/weights_abs_sum"), rel=1e-9)
        q, image = model.encode(x), model.decode(z)
        found = {"mu": q.mu, "logvar": q.logvar} | {f"decode/{k}": v for k, v in _summary(image).items()}
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

"""`train --dry-run`: what it says is what a run then does, and it writes nothing."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import Runner, refused, write_config
from torch import nn

from sivae_dist.engine.config import from_dict, read_yaml
from sivae_dist.engine.dry_run import times_due
from sivae_dist.engine.dry_run_measure import Stretch
from sivae_dist.engine.schedule import due

IMAGE = 3 * 16 * 16


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, (pattern, text)
    return float(found[1].replace(",", ""))


def forward_flops(config: Path) -> tuple[float, float]:
    """FLOPs of encoder and decoder, forwards, for one image, by the layers' sizes; and those of the first layer."""
    model = from_dict(read_yaml(config), "test").model.build()
    layers: list[float] = []

    def count(layer: Any, inputs: Any, output: torch.Tensor) -> None:
        per_output = layer.weight[0].numel()  # multiply-adds behind one output value
        layers.append(2.0 * per_output * output.numel())

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model.eval()
    model.decode(model.encode(torch.zeros(1, *model.sample_shape)).mu)
    return sum(layers), layers[0]


def test_of_a_new_run(run: Runner, packed: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"objective": {"vae_warmup_kimg": 0.02}, "train": {"kimg": 0.06, "accumulation": 2}}
    config = write_config(tmp_path / "c.yaml", packed, **changes)
    before = listing(packed)
    done = run("train", "--config", config, "--out", tmp_path / "run", "--dry-run")
    assert done.status == 0, done
    assert not (tmp_path / "run").exists() and listing(packed) == before
    text = done.stdout
    model = from_dict(read_yaml(config), "test").model.build()
    for name in ("encoder", "decoder"):
        assert number(rf"{name} +([\d,]+) parameters", text) == sum(
            p.numel() for p in getattr(model, name).parameters()
        )
    # Two stretches: the warm-up of 2 iterations, then 4 of the adversarial phases.
    assert re.findall(r"from ([\d.]+) kimg, (\d+) iterations", text) == [("0", "2"), ("0.02", "4")]
    assert re.findall(r"phase (\w+) ", text) == ["joint", "encoder", "decoder"]
    assert all(float(x) == float(x) for x in re.findall(r"loss ([^,]+),", text))
    # Backwards costs twice forwards, except that nobody wants the gradient by the pixels.
    flops, first = forward_flops(config)
    assert number(r"phase joint .*?, ([\d.e-]+) GFLOP", text) * 1e9 == pytest.approx(3 * flops - first, rel=1e-3)
    assert "40 samples, 1.50 epochs in the run" in text
    assert "4 shards, 8 lanes" in text
    assert "0 to 0.06 kimg, 6 iterations;" in text
    assert "estimated time: " in text


def test_what_it_announces_happens(run: Runner, config: Path, trained: Path, tmp_path: Path) -> None:
    done = run("train", "--config", config, "--out", tmp_path / "run", "--dry-run")
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert number(r"([\d,]+) reports", done.stdout) == sum("kl/real" in row for row in rows) == 3
    assert number(r"([\d,]+) evaluations", done.stdout) == sum("eval/psnr" in row for row in rows) == 1
    assert number(r"([\d,]+) checkpoints", done.stdout) == 3
    newest = max((trained / "checkpoints").glob("nimg-*"))
    size = sum(p.stat().st_size for p in newest.glob("*.safetensors")) / (1 << 20)
    assert number(r"a checkpoint takes ([\d.]+) MiB", done.stdout) == pytest.approx(size, rel=0.2)


def test_of_a_run_that_has_begun(run: Runner, trained: Path, tmp_path: Path) -> None:
    before = listing(trained)
    config = trained.parent / "small.yaml"
    done = run("train", "--config", config, "--out", trained, "--train.kimg", 0.1, "--dry-run")
    assert done.status == 0, done
    assert "0.06 to 0.1 kimg, 4 iterations" in done.stdout
    finished = run("train", "--config", config, "--out", trained, "--dry-run")
    assert finished.status == 0 and "0 iterations" in finished.stdout
    assert listing(trained) == before
    refused(run("train", "--config", config, "--out", trained, "--dry-run", "--model.zdim", 7), "zdim 6 (now 7)")


def test_of_a_growing_model(run: Runner, packed: Path, tmp_path: Path) -> None:
    """Every level is measured, fading and not, with its own batch and resolution."""
    growth = {"enabled": True, "level_kimg": 0.12, "fade_kimg": 0.06, "batch": [12, 8, 6], "lr": [0.002]}
    config = write_config(
        tmp_path / "c.yaml",
        packed,
        objective={"decoder_z": "reencode", "draws": "fresh"},
        train={"kimg": 0.36, "batch": 12},
        progressive=growth,
    )
    style = {"name": "style", "image_size": 16, "startf": 4, "maxf": 8, "latent_size": 6, "mapping_layers": 2}
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"model": style}))
    done = run("train", "--config", config, "--out", tmp_path / "run", "--dry-run")
    assert done.status == 0, done
    lines = re.findall(r"from ([\d.]+) kimg, (\d+) iterations of (\d+) images of 3 x (\d+) x", done.stdout)
    assert lines == [
        ("0", "10", "12", "4"),
        ("0.12", "8", "8", "8"),
        ("0.184", "7", "8", "8"),
        ("0.24", "10", "6", "16"),
        ("0.3", "10", "6", "16"),
    ]
    assert "45 iterations;" in done.stdout


@pytest.mark.parametrize("every", [0.0, 0.001, 0.007, 0.01, 0.025, 5.0])
@pytest.mark.parametrize("start", [0, 30])
def test_times_due(every: float, start: int) -> None:
    """Two stretches with batches of 10 and 30, against asking at every iteration."""
    ends = [(end, 10) for end in range(start + 10, 101, 10)] + [(end, 30) for end in range(130, 221, 30)]
    stretches = [Stretch(start, 10, (100 - start) // 10), Stretch(100, 30, 4)]
    assert times_due(stretches, every) == sum(due(end, size, every) or end == 220 for end, size in ends)
    assert times_due([Stretch(0, 10, 300_000_000)], 50.0) == 60_000
    assert times_due([Stretch(200, 10, 0)], every) == 0


def test_it_prints_to_the_output_only(run: Runner, config: Path, tmp_path: Path) -> None:
    done = run("train", "--config", config, "--out", tmp_path / "run", "--dry-run", "--resume", "never")
    assert done.status == 0 and done.stdout.startswith("dry run: nothing is written to")
    assert os.listdir(tmp_path) == ["small.yaml"]

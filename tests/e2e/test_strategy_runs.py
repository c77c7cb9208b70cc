"""Runs under every strategy, started with launch/accelerate's files and resumed under another: the same end."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from launching import ROOT, launch_command, launch_env
from running import results, sivae_dist
from safetensors.numpy import load_file

TOLERANCE = 1e-2  # of the largest entry: float32, 40 iterations in which two players amplify the order of sums


def launched(file: str, run: Path, config: Path, *options: str) -> None:
    command = launch_command(2, "-m", "sivae_dist.train", "--config", str(config), "--out", str(run), *options)
    command[command.index("--config_file") + 1] = str(ROOT / "launch/accelerate" / file)
    done = subprocess.run(command, env=launch_env(), cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def last(run: Path) -> dict[str, np.ndarray]:
    folder = run / "checkpoints" / (run / "checkpoints/latest").read_text().strip()
    return {
        f"{stem}/{k}": v for stem in ("weights", "ema") for k, v in load_file(folder / f"{stem}.safetensors").items()
    }


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("file", ["fsdp2.yaml", "deepspeed.yaml"])
def test_a_run_in_three_parts(file: str, config: Path, tmp_path: Path) -> None:
    """Two sharded ranks, one that is whole, sharded ones again, with evaluations, pictures and checkpoints."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--model.norm", "group", "--optim.encoder.eps", "1e-4", "--optim.decoder.eps", "1e-4"]
    # Shards are contiguous, and torch's group norm rounds channels_last maps otherwise, by up to 3e-3 in small biases.
    options += ["--precision.channels_last", "False"]
    done = sivae_dist("train", "--config", str(config), "--out", str(whole), *options)
    assert done.returncode == 0, done.stderr
    launched(file, parts, config, *options, "--train.kimg", "0.15", "--distributed.unit_parameters", "500")
    done = sivae_dist("train", "--config", str(config), "--out", str(parts), *options, "--train.kimg", "0.25")
    assert done.returncode == 0, done.stderr
    launched(file, parts, config, *options, "--distributed.unit_parameters", "500")
    expected, got = last(whole), last(parts)
    assert set(expected) == set(got)
    for name, value in expected.items():
        scale = max(float(np.abs(value).max(initial=0.0)), 1e-3)
        assert float(np.abs(got[name] - value).max(initial=0.0)) / scale <= TOLERANCE, name
    rows = {row["nimg"]: row for row in results(parts)}
    for row in results(whole):
        for tag in ("loss/encoder", "loss/decoder", "eval/psnr"):
            if tag in row and row["nimg"] in rows and tag in rows[row["nimg"]]:
                assert rows[row["nimg"]][tag] == pytest.approx(row[tag], rel=TOLERANCE), (tag, row["nimg"])
    done = sivae_dist("diff", str(whole), str(parts), "--tolerance", str(TOLERANCE))
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[-1].startswith("differ in rounding from ")
    assert any(row.get("dist/bytes_per_step", 0) > 0 for row in rows.values())


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("file", ["fsdp2.yaml", "deepspeed.yaml"])
def test_a_run_with_the_default_layout(file: str, config: Path, tmp_path: Path) -> None:
    """channels_last weights, batch norm: what neither can have as it is."""
    launched(file, tmp_path, config, "--train.kimg", "0.03")
    assert all(np.isfinite(value).all() for value in last(tmp_path).values())

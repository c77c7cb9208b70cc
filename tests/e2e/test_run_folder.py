"""What a run leaves behind: files of the contract, TensorBoard as a real TensorBoard reads it, a loadable model."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from launching import accelerate_launch
from PIL import Image
from running import environment, sivae_dist

import sivae_dist as package

SCALARS = {
    *(f"loss/{p}" for p in ("encoder", "decoder")),
    *("rec/real", "kl/real", "kl/rec", "kl/fake", "kl/gap", "exp_elbo/rec", "exp_elbo/fake"),
    *(f"{kind}/{p}" for kind in ("grad_norm", "lr") for p in ("encoder", "decoder")),
    *(f"time/{name}" for name in ("step_s", "data_wait_fraction", "img_per_s", "s_per_kimg", "train_s", "cpu_s")),
    *(
        "mem/cpu_gib",
        "guard/nonfinite",
        "guard/skipped",
        "data/epoch",
        "data/skipped",
        "eval/psnr",
        "eval/psnr_mean_image",
        "eval/swd",
    ),
}
IMAGES = {f"images/{name}" for name in ("real", "rec_mu", "rec_sample", "prior", "prior_ema")}


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks under accelerate, with a batch that two does not divide."""
    folder = tmp_path_factory.mktemp("ranks") / "run"
    options = ["--config", str(config), "--out", str(folder), "--train.batch", "9", "--distributed.ranks", "2"]
    done = accelerate_launch(2, "-m", "sivae_dist.train", *options, "--tracking.progress", "True")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder.parent / "said.txt").write_text(done.stderr)
    return folder


@pytest.mark.dist
def test_the_progress_line_ends_with_what_was_last(run: Path) -> None:
    """Written by one rank; the loss of the VAE's warm-up is gone from it."""
    last = [line for line in (run.parent / "said.txt").read_text().splitlines() if "training" in line][-1]
    assert "training 100%" in last
    assert all(word in last for word in ("0.4/0.4 kimg", "img/s", "encoder ", "decoder ", "kl real ", "psnr "))
    assert "loss " not in last


@pytest.mark.dist
def test_files_of_the_contract(run: Path, shards: Path) -> None:
    assert {"config.yaml", "manifest.json", "metrics.jsonl", "summary.json"} <= {p.name for p in run.iterdir()}
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["launch"]["ranks"] == 2
    assert manifest["kernels"] == {"mode": "auto", "running": "reference"}
    assert manifest["packages"]["torch"] == torch.__version__
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["url"] == str(shards)
    for rank in (0, 1):
        assert "finished at 405 images" in (run / f"logs/rank-{rank}.log").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"] is True
    assert summary["nimg"] == 405
    assert np.asarray(Image.open(run / summary["grid"])).std() > 10
    assert summary["swd_ratio_to_untrained"] > 0
    assert "psnr_gain_over_mean_image_db" in summary


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.loads(answer.read())


@pytest.mark.dist
def test_tensorboard_reads_it(run: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(run),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        base, tags = f"http://127.0.0.1:{port}/data/plugin", {}
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                tags = get(f"{base}/scalars/tags").get("tensorboard", {})
                if tags.keys() >= SCALARS:
                    break
            except (urllib.error.URLError, ConnectionError):
                pass
            time.sleep(0.3)
        assert tags.keys() >= SCALARS
        assert get(f"{base}/images/tags")["tensorboard"].keys() >= IMAGES
        points = get(f"{base}/scalars/scalars?run=tensorboard&tag=kl%2Freal")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        expected = [(row["nimg"], row["kl/real"]) for row in rows if "kl/real" in row]
        assert [(step, pytest.approx(value, rel=1e-6)) for _, step, value in points] == expected
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.mark.dist
def test_two_ranks_train_as_one(run: Path, config: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    done = sivae_dist("train", "--config", str(config), "--out", str(alone), "--train.batch", "9")
    assert done.returncode == 0, done.stderr
    rows = [[json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (run, alone)]
    assert [row["nimg"] for row in rows[0]] == [row["nimg"] for row in rows[1]]
    # float32 sums in another order part slowly: compare the first report tightly, the last one loosely.
    reports = [[row for row in r if "kl/real" in row] for r in rows]
    for tag in ("rec/real", "kl/real"):
        assert reports[0][0][tag] == pytest.approx(reports[1][0][tag], rel=1e-4), tag
        assert reports[0][-1][tag] == pytest.approx(reports[1][-1][tag], rel=5e-2), tag


@pytest.mark.dist
def test_load_and_evaluate(run: Path) -> None:
    model = package.load(run)
    samples = model.sample(3, seed=1)
    assert samples.shape == (3, 3, 16, 16)
    assert float(samples.min()) >= 0 <= float(samples.max()) <= 1
    assert torch.allclose(model.sample(2, seed=1), samples[:2], atol=1e-6)
    posterior = model.encode(samples)
    assert posterior.mu.shape == posterior.logvar.shape == (3, 6)
    assert torch.equal(model.reconstruct(samples), model.decode(posterior.mu))
    done = sivae_dist("evaluate", str(run), "--images", "16")
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    printed = dict(line.split()[:2] for line in done.stdout.splitlines() if line.startswith("eval/"))
    assert float(printed["eval/psnr"]) == pytest.approx(summary["metrics"]["eval/psnr"], abs=1e-3)


@pytest.mark.dist
def test_too_few_ranks_is_an_error(config: Path, tmp_path: Path) -> None:
    options = ["--config", str(config), "--out", str(tmp_path / "run"), "--distributed.ranks", "2"]
    done = sivae_dist("train", *options)
    assert done.returncode == 2
    assert "distributed.ranks is 2, but 1 process started" in done.stderr
    assert "Traceback" not in done.stderr

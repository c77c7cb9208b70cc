"""Models of points on two real ranks: trained, judged and drawn as on one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from launching import ROOT, launch_command, launch_env
from PIL import Image
from running import results, sivae_dist

RECIPE = ["--config", str(ROOT / "configs/toy/8gaussians_soft_introvae.yaml"), "--tracking.progress", "False"]
# 3 x 333 points: no part of a batch, of the data or of the held-out points is the same on both ranks.
SHORT = ["--train.kimg", "4", "--train.batch", "333", "--eval.every_kimg", "2", "--eval.images", "999"]
SHORT += ["--tracking.every_kimg", "1", "--tracking.images_every_kimg", "2", "--objective.vae_warmup_kimg", "1"]


@pytest.mark.dist
@pytest.mark.slow
def test_points_on_two_ranks(tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    done = sivae_dist("train", *RECIPE, *SHORT, "--out", str(alone))
    assert done.returncode == 0, done.stderr
    command = launch_command(2, "-m", "sivae_dist.train", *RECIPE, *SHORT, "--out", str(together))
    done = subprocess.run(command, env=launch_env(), cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    expected, got = results(alone), results(together)
    assert [row["nimg"] for row in expected] == [row["nimg"] for row in got]
    pairs = list(zip(expected, got, strict=True))
    assert len([a for a, _ in pairs if "eval/hist_kl" in a]) >= 2

    tags: set[str] = set()
    for one, two in pairs:
        tags |= {tag for tag in one if tag.startswith(("eval/", "loss/", "kl/", "rec/"))}
        for tag in tags & set(one):
            assert two[tag] == pytest.approx(one[tag], rel=2e-3, abs=1e-4), (tag, one["nimg"])
    assert {"eval/rec", "eval/swd", "eval/hist_jsd", "eval/grid_nll", "kl/real", "kl/fake"} <= tags
    pictures = [{file.name: Image.open(file).size for file in (run / "samples").iterdir()} for run in (alone, together)]
    assert pictures[0] == pictures[1] != {}

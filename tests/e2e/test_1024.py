"""1024 pixels for real: both phases and both optimizer steps of every architecture for images, at full width."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, environment

from sivae_dist.engine.config import from_dict, read_yaml
from sivae_dist.engine.predict_memory import Case, predict

# Recipe -> bound in GiB of the peak of the whole process (resident set), everything recomputed, one image, float32:
# the prediction, a quarter more for what operations allocate for themselves, 1 for Python and torch.
RECIPES = ["celebahq1024_residual", "ffhq1024_style", "ffhq1024_modulated"]
ALLOWED = 1.25
BESIDES_GIB = 1.0
LARGEST_GIB = 10.0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_iteration(recipe: str) -> None:
    path = ROOT / f"configs/{recipe}.yaml"
    told = step(path)
    print(told)
    assert told["phases"] == ["encoder", "decoder"] and told["skip"] is None and told["finite"]
    assert all(math.isfinite(value) for value in told["terms"].values())
    assert all(0 < norm < float("inf") for norm in told["gradients"].values())
    assert told["moved"] and set(told["still"]) == set(told["without_gradient"])
    config = from_dict({**read_yaml(path), "train": {"recompute_from": 0}}, recipe)
    predicted = predict(Case(config, 1, "fp32")).total / (1 << 30)
    assert predicted < told["peak_gib"] < min(ALLOWED * predicted + BESIDES_GIB, LARGEST_GIB)


def step(recipe: Path) -> dict[str, Any]:
    script = Path(__file__).with_name("step_1024.py")
    done = subprocess.run(
        [sys.executable, str(script), str(recipe), "fp32"],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result

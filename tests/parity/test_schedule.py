"""Growing and learning rates against the table that the public driver and scheduler gave, batch by batch."""

from __future__ import annotations

import numpy as np
import pytest
from golden_files import files, of

from sivae_dist.engine.optim import OptimConfig
from sivae_dist.engine.progressive import GrowthConfig

CASES = [(name, case) for name in of("schedule") for case in sorted({k.split("/")[0] for k in files()[name].arrays})]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_table(name: str, case: str) -> None:
    golden = files()[name]
    cfg = {key: golden.array(whole).tolist() for key, whole in golden.under(f"{case}/cfg/").items()}
    size, per_level, levels, world = cfg["size"], cfg["epl"], cfg["layers"], cfg["world"]
    growth = GrowthConfig(
        level_kimg=per_level * size / 1000,
        fade_kimg=(per_level // 2) * size / 1000,
        batch=tuple(cfg[f"b{world}"]),
        lr=tuple(cfg["lrs"]),
        beta_neg=tuple(map(float, cfg["beta_neg"])),
        beta_neg_lag_kimg=size / 1000,
    )
    # The scheduler is advanced once when it is made, so that a milestone acts one epoch early.
    optim = OptimConfig(milestones_kimg=tuple((m - 1) * size / 1000 for m in cfg["milestones"]))
    found = []
    for row in golden.array(f"{case}/table"):
        epoch, iteration, images = (int(value) for value in row[:3])
        nimg = epoch * size + images
        stage = growth.at(nimg, levels)
        level_before = growth.level(max(epoch - 1, 0) * size, levels)
        first = growth.level(epoch * size, levels)
        faded = stage.level > 0 and nimg - stage.level * per_level * size < (per_level // 2) * size
        rate = stage.lr * optim.factor(nimg)
        found.append(
            [
                *(epoch, iteration, images),
                *(stage.level, faded, stage.blend, stage.batch, stage.batch // world, stage.level + 2),
                *(rate, stage.beta_neg, first != level_before),
            ]
        )
    np.testing.assert_allclose(np.array(found, dtype=np.float64), golden.array(f"{case}/table"), rtol=1e-12, atol=1e-15)
    assert max(cfg["epochs"] - 1, 0) == int(found[-1][0])
    assert cfg["base_lr"] > 0  # replaced by the list
    assert all(len(cfg[f"b{n}"]) >= levels for n in (1, 2, 4, 8))

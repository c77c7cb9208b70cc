from __future__ import annotations

from pathlib import Path

import pytest
from saving import MODULATED, RESIDUAL, STYLE, save


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name; conditional: 3 classes, grey; points: 2-D; growing: at 8 of 16 px, half faded in."""
    root = tmp_path_factory.mktemp("runs")
    growth = {"enabled": True, "level_kimg": 1.0, "fade_kimg": 1.0}
    return {
        "style": save(root / "style", STYLE, nimg=2500),
        "modulated": save(root / "modulated", MODULATED),
        "residual": save(root / "residual", RESIDUAL),
        "conditional": save(root / "conditional", {**RESIDUAL, "channels_in": 1, "condition_dim": 3}),
        "points": save(root / "points", {"name": "mlp", "width": 8, "hidden_layers": 1}),
        "growing": save(root / "growing", STYLE, nimg=1501, progressive=growth),
    }

"""`sivae-dist bench checkpoint` on the smallest model: it runs, measures something, and removes what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from sivae_dist.cli import main


def test_bench_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"name": "mlp", "width": 4, "hidden_layers": 1}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": model, "train": {"batch": 4}}))
    (tmp_path / "out").mkdir()
    arguments = [str(tmp_path / "c.yaml"), "--checkpoints", "1", "--out", str(tmp_path / "out"), "--json"]
    main(["bench", "checkpoint", *arguments])
    rows = json.loads(capsys.readouterr().out)
    assert [row["format"] for row in rows] == ["whole", "sharded"]
    assert all(row["wait"] > 0 and row["iteration"] > 0 and row["bytes"] > 1000 for row in rows)
    assert not list((tmp_path / "out").iterdir())

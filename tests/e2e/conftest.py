"""A small packed dataset and the configuration that trains on it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "dist")]

from running import SMALL, sivae_dist  # noqa: E402 (the folder must be on the path first)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 training and 16 held-out scenes of 16 px in several shards."""
    folder = tmp_path_factory.mktemp("scenes") / "shards"
    command = ["data", "scenes", str(folder), "--count", "88", "--resolution", "16", "--val-count", "16"]
    done = sivae_dist(*command, "--shard-size", "20")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def config(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "data": {**SMALL["data"], "url": str(shards)}}))
    return path

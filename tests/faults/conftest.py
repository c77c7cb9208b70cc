from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Runner, write_config


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(tmp_path_factory.mktemp("commands"))
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def packed(run: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training and 8 held-out scenes of 16 px in several shards. Not to be changed: see `shards`."""
    folder = tmp_path_factory.mktemp("packed") / "shards"
    options = ["--count", 48, "--resolution", 16, "--val-count", 8, "--shard-size", 12, "--workers", 1]
    done = run("data", "scenes", folder, *options)
    assert done.status == 0, done
    return folder


@pytest.fixture
def shards(packed: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(packed, tmp_path / "shards"))


@pytest.fixture
def config(packed: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path / "small.yaml", packed)


@pytest.fixture(scope="session")
def trained(run: Runner, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 60 images with its last two checkpoints. Not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_config(folder / "small.yaml", packed)
    done = run("train", "--config", path, "--out", folder / "run")
    assert done.status == 0, done
    return folder / "run"

"""The shard folder that most tests of the data room read."""

from __future__ import annotations

from pathlib import Path

import pytest
from drawn import draw_folder
from processes import remember_elder

from sivae_dist.data.pack import pack
from sivae_dist.data.pack_shard import PackOptions
from sivae_dist.data.sources.folder import FolderSource


@pytest.fixture(autouse=True)
def only_own_children() -> None:
    """`processes.children()` are those of the test, whatever ran before it."""
    remember_elder()


@pytest.fixture(scope="session")
def packed(tmp_path_factory) -> Path:
    """41 labelled pictures of 16 px, lossless, in shards of up to 7; 5 held out. Never change it, copy it."""
    root = tmp_path_factory.mktemp("packed")
    source = FolderSource(draw_folder(root / "raw", 41, classes=3), labels=True, license="CC0-1.0")
    options = PackOptions(16, format="png", shard_size="7", val_count=5)
    pack(source, root / "shards", options, workers=1, progress=False)
    return root / "shards"

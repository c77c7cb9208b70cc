"""Runs last: every array of the fixtures was compared, used as input, or is left out for a stated reason."""

from __future__ import annotations

import pytest
from golden_files import files, folder, left_out


def test_every_array_is_accounted_for(partial: str) -> None:
    if partial:
        pytest.skip(f"only part of the parity tests was selected ({partial})")
    assert files(), f"no .npz in {folder()}"
    silent = [
        f"{name}:{key}"
        for name, golden in files().items()
        for key in golden.arrays
        if key not in golden.used and not left_out(name, key)
    ]
    assert not silent, f"{len(silent)} arrays neither used nor in LEFT_OUT, e.g. {silent[:20]}"

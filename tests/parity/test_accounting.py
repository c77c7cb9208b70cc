"""Every array of the fixtures was compared, used as input, or is left out for a stated reason.

Runs last, and only when all parity tests run.
"""

from __future__ import annotations

from golden_files import files, folder, left_out


def test_every_array_is_accounted_for() -> None:
    assert files(), f"no .npz in {folder()}"
    silent = [
        f"{name}:{key}"
        for name, golden in files().items()
        for key in golden.arrays
        if key not in golden.used and not left_out(name, key)
    ]
    assert not silent, f"{len(silent)} arrays neither used nor in LEFT_OUT, e.g. {silent[:20]}"

"""The command lines that train on a small data set, as a user would, and what a run leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

SMALL: dict[str, Any] = {
    "model": {"image_size": 16, "channels": [4, 8], "zdim": 6},
    "objective": {"beta_neg": 16.0, "vae_warmup_kimg": 0.08},
    "data": {"workers": 1, "lanes": 8, "window": 16},
    "train": {"kimg": 0.4, "batch": 10},
    "ema": {"half_life_kimg": 0.1},
    "checkpoint": {"every_kimg": 0.06, "keep_last": 3},
    "tracking": {"every_kimg": 0.05, "images_every_kimg": 0.2, "images": 4, "progress": False},
    "eval": {"every_kimg": 0.15, "images": 16},
}
# Tags whose values are times or sizes, not results.
MEASURED = ("time/", "mem/")


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(extra or {})}


def sivae_dist(*arguments: str, env: dict[str, str] | None = None, timeout: float = 240) -> Any:
    """Runs the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "sivae_dist", *arguments],
        env=environment(env),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def results(run: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics without times and sizes."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in rows]


def final_files(run: Path) -> dict[str, bytes]:
    """The tensors of the last checkpoint, as bytes."""
    last = run / "checkpoints" / (run / "checkpoints/latest").read_text().strip()
    return {path.name: path.read_bytes() for path in sorted(last.glob("*.safetensors"))}

"""Starts real processes through `accelerate launch`, as users do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def accelerate_launch(
    ranks: int, *command: str, timeout: float = 300, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `accelerate launch ... command` on CPU ranks and returns what it printed; never raises on failure."""
    return subprocess.run(
        launch_command(ranks, *command),
        env=launch_env(env),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def launch_command(ranks: int, *command: str) -> list[str]:
    flags = ["--config_file", str(ROOT / "launch/accelerate/cpu-2.yaml"), "--num_processes", str(ranks)]
    if ranks == 1:
        flags = ["--config_file", str(ROOT / "launch/accelerate/single.yaml")]
    return [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *flags, *command]


def launch_env(extra: dict[str, str] | None = None) -> dict[str, str]:
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(extra or {})}

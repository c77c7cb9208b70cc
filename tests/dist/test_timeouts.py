"""distributed.timeout_s holds in every process group, whoever makes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import accelerate_launch


@pytest.mark.dist
@pytest.mark.slow
def test_every_group_has_the_configured_timeout() -> None:
    done = accelerate_launch(2, str(Path(__file__).with_name("probe_groups.py")), "77", timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    counts = {what: len(seconds) for what, seconds in made.items()}
    assert counts["launch"] == counts["ddp"] == counts["deepspeed"] == counts["checkpoints in parts"] == 1
    assert counts["fsdp2"] == 0 and counts["copies of shards"] == 2  # all ranks in one mesh are the launch's group
    assert {second for seconds in made.values() for second in seconds} == {77.0}, made

"""`bench step` times a recipe's iteration with settings changed."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest
import torch

from sivae_dist.apps.bench import step
from sivae_dist.apps.bench.turns import in_turns
from sivae_dist.cli import main
from sivae_dist.errors import UserError

CONFIG = """\
model: {name: residual, image_size: 8, channels: [4, 6], zdim: 4}
objective: {name: soft_introvae, vae_warmup_kimg: 5}
data: {url: unread}
train: {batch: 6, accumulation: 2}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    return path


def test_settings_are_laid_over_the_recipe(config: Path) -> None:
    found = step.varied(config, ("train.decode_once=true, precision.dtype=bf16", "optim.clip_norm=1e-3"), 4)
    assert list(found) == [step.AS_IT_IS, "train.decode_once=true, precision.dtype=bf16", "optim.clip_norm=1e-3"]
    plain, both, rate = found.values()
    assert (plain.train.batch, plain.train.accumulation, plain.train.decode_once) == (4, 1, False)
    assert (both.train.decode_once, both.precision.dtype, both.train.batch) == (True, "bf16", 4)
    assert rate.optim.clip_norm == 1e-3
    assert step.varied(config, (), None)[step.AS_IT_IS].train.accumulation == 2


@pytest.mark.parametrize(
    "text, message",
    [
        ("decode_once", "expected section.key=value"),
        ("train.decode_once", "expected section.key=value"),
        ("train.decode=true", "there is no key train.decode"),
        ("trains.decode_once=true", "there is no section"),
        ("train.decode_once=perhaps", "expected True or False"),
        ("train.batch=[1", "not valid YAML"),
    ],
)
def test_settings_that_do_not_exist_are_refused(config: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        step.varied(config, (text,), None)


def test_a_block_trains_in_both_phases(config: Path) -> None:
    """Past the warm-up, at the recipe's batch; time passes, and on a CPU no memory is told."""
    each = step.varied(config, (), None)[step.AS_IT_IS]
    block = step._start(each, "cpu", torch.get_num_threads())(2)
    assert block.wall > 0
    assert block.cpu > 0
    assert block.peak is None


@pytest.mark.slow
def test_the_command(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "step", str(config), "--seconds", "0.1", "--vary", "train.decode_once=true", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [step.AS_IT_IS, "train.decode_once=true"]
    assert rows[0]["ratio"] == 1
    assert all(row["wall_ms"] > 0 and row["images_per_s"] > 0 for row in rows)
    main(["bench", "step", str(config), "--seconds", "0.1"])
    assert "as configured" in capsys.readouterr().out


def _start(mistake: str) -> object:
    if mistake == "a user's":
        raise UserError("nothing fits", "buy another")
    return functools.partial(_block, mistake)


def _block(mistake: str, count: int) -> float:
    if mistake == "ends":
        os._exit(3)
    return 0.5 * count


@pytest.mark.slow
def test_a_contender_that_cannot_run_is_told() -> None:
    def measured(*names: str) -> dict[str, list[float]]:
        starts = {name: functools.partial(_start, name) for name in names}
        return in_turns(starts, seconds=0.0, spent=lambda s: s, block=4)  # type: ignore[arg-type]

    assert measured("one", "two") == {"one": [2.0, 2.0, 2.0], "two": [2.0, 2.0, 2.0]}
    with pytest.raises(UserError, match="a user's: nothing fits\n  fix: buy another"):
        measured("one", "a user's")
    with pytest.raises(UserError, match="the process that measures 'ends' has ended"):
        measured("one", "ends")

"""Checkpoints that cannot be resumed from: told, and left as they are."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Runner, checkpoints, refused, write_config
from safetensors.torch import load_file, save_file


@pytest.fixture
def again(run: Runner, trained: Path, tmp_path: Path) -> tuple[Path, Callable[..., Any]]:
    """A copy of a finished run's newest checkpoint, and the command that would go on from it."""
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    newest = folder / "checkpoints" / checkpoints(folder)[-1]
    config = trained.parent / "small.yaml"
    return newest, lambda *more: run("train", "--config", config, "--out", folder, "--train.kimg", 0.08, *more)


def signed(checkpoint: Path) -> None:
    """Makes the list of files agree with files that were changed."""
    listing = {}
    for path in sorted(checkpoint.iterdir()):
        if path.name != "files.json":
            data = path.read_bytes()
            listing[path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "files.json").write_text(json.dumps(listing))


def change_state(checkpoint: Path, **changes: Any) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, **changes}))
    signed(checkpoint)


def test_the_fixture_goes_on(again) -> None:
    newest, command = again
    change_state(newest)
    done = command()
    assert done.status == 0, done
    assert checkpoints(newest.parents[1])[-1] == "nimg-000000080"


def test_newer_format(again) -> None:
    newest, command = again
    change_state(newest, format=3, sums={"new": "meaning"})
    (newest / "controller.safetensors").write_bytes(b"a file of the future")
    signed(newest)
    refused(command(), "checkpoint format 3, this version reads up to 2", "update sivae-dist")
    assert (newest / "controller.safetensors").is_file()


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--model.zdim", 7, "zdim 6 (now 7)"),
        ("--model.norm", "group", "norm 'batch' (now 'group')"),
        ("--train.seed", 5, "train.seed 0 (now 5)"),
        ("--data.lanes", 4, "data.lanes 8 (now 4)"),
        ("--data.decode", "gpu", "data.decode 'cpu' (now 'gpu')"),
    ],
)
def test_another_architecture_in_the_config(again, option: str, value: object, says: str) -> None:
    refused(again[1](option, value), "was trained with", says, "another --out")


def test_another_architecture_in_the_file(again) -> None:
    newest, command = again
    tensors = load_file(newest / "weights.safetensors")
    name = next(n for n in tensors if n.endswith("weight"))
    save_file({**tensors, name: torch.zeros(1, 2, 3)}, newest / "weights.safetensors")
    signed(newest)
    refused(command(), "another architecture", f"{name}: (1, 2, 3) there")


def test_optimizer_state_that_does_not_fit(again) -> None:
    newest, command = again
    tensors = load_file(newest / "optimizer.safetensors")
    name = next(n for n in tensors if n.endswith("exp_avg"))
    for damaged in ({n: t for n, t in tensors.items() if n != name}, {**tensors, name: torch.zeros(3)}):
        save_file(damaged, newest / "optimizer.safetensors")
        signed(newest)
        refused(command(), "optimizer state of", "does not fit")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"nimg": "many"}, "has nimg = 'many', expected int"),
        ({"nimg": -5}, "has nimg = -5"),
        ({"plan_salt": None}, "has plan_salt = None"),
        ({"sums": {"kl/real": ["x", 1]}}, "has sums of 'kl/real'"),
        ({"sums": {"kl/real": [1.0, 0.5]}}, "has sums of 'kl/real'"),
        ({"data": "another"}, "the data are not those"),
        ({"guard": [1]}, "what no part of a run has written"),
        ({"guard": {"skipped": "x"}}, "what no part of a run has written"),
        ({"loss_scales": {"scale": 3}}, "what no part of a run has written"),
        ({"config": 3}, "has config = 3"),
        ({"format": "two"}, "checkpoint format 'two'"),
    ],
)
def test_state_that_is_not_believable(again, changes: dict[str, Any], says: str) -> None:
    change_state(again[0], **changes)
    refused(again[1](), says)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "files.json"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-7], lambda data: b"", lambda data: data[:40] + b"\xff" + data[41:]]
)
def test_damaged_files(again, name: str, damage: Callable[[bytes], bytes]) -> None:
    newest, command = again
    (newest / name).write_bytes(damage((newest / name).read_bytes()))
    refused(command(), str(newest), "resume from another checkpoint")


@pytest.mark.parametrize("name", ["weights.safetensors", "ema.safetensors"])
def test_damaged_safetensors_with_a_right_checksum(again, name: str) -> None:
    newest, command = again
    data = (newest / name).read_bytes()
    for damaged in (b"", data[:7], (1 << 62).to_bytes(8, "little") + data[8:], data[:8] + b"{" * 64 + data[72:]):
        (newest / name).write_bytes(damaged)
        signed(newest)
        refused(command(), "cannot read the checkpoint")


def test_the_one_before_can_be_named(again) -> None:
    """A damaged newest checkpoint costs the images since the one before, not the run."""
    newest, command = again
    (newest / "weights.safetensors").write_bytes(b"")
    refused(command(), "resume from another checkpoint")
    before = newest.parent / checkpoints(newest.parents[1])[-2]
    done = command("--resume", before)
    assert done.status == 0, done


def test_evaluate_needs_a_whole_checkpoint(run: Runner, again, packed: Path, tmp_path: Path) -> None:
    newest, _ = again
    change_state(newest, config={"model": {"zdimm": 3}})
    refused(run("evaluate", newest.parents[1]), "no key model.zdimm")
    refused(run("evaluate", tmp_path / "nothing"), "there is no checkpoint in")
    assert write_config(tmp_path / "c.yaml", packed).is_file()


def test_what_killed_processes_left_of_checkpoints_is_removed(run: Runner, trained: Path, tmp_path: Path) -> None:
    """A part of a checkpoint that no later one happens to overwrite had filled the disk for good."""
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    left = [folder / "checkpoints" / name for name in (".nimg-000000017.tmp", ".nimg-000000018.deleted")]
    for path in left:
        path.mkdir()
        (path / "weights.safetensors").write_bytes(b"half")
    command = ("train", "--config", folder / "config.yaml", "--out", folder)
    assert run(*command, "--dry-run").status == 0
    assert all(path.is_dir() for path in left), "a dry run only reads"
    before = checkpoints(folder)
    assert run(*command).status == 0
    assert not any(path.exists() for path in left)
    assert checkpoints(folder) == before

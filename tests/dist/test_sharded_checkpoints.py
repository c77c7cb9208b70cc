"""Checkpoints in parts: read on any number of ranks under any strategy, safe to read, whole or absent."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import accelerate_launch
from safetensors.torch import load_file, save_file
from test_ranks_differ import SETTINGS

import sivae_dist
from sivae_dist.apps.diff import diff
from sivae_dist.apps.diff_report import summary
from sivae_dist.distributed import parts
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.engine import checkpoint, checkpoint_sharded
from sivae_dist.engine.config import from_dict
from sivae_dist.engine.run import train
from sivae_dist.errors import UserError

PROBE = str(Path(__file__).with_name("probe_sharded.py"))
RESIDUAL = {"name": "residual", "image_size": 16, "channels": [4, 6], "zdim": 5}


def settings(format: str, kimg: float, **changes: Any) -> Any:
    small = {"name": "mlp", "width": 8, "hidden_layers": 1}
    values = {**SETTINGS, "model": small, "train": {"kimg": kimg, "batch": 50}, **changes}
    return from_dict({**values, "checkpoint": {**SETTINGS["checkpoint"], "format": format}}, "test")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same training in both formats."""
    folder = tmp_path_factory.mktemp("formats")
    return {name: train(settings(name, 0.1), folder / name) for name in ("whole", "sharded")}


def newest(run: Path) -> Path:
    found = checkpoint.latest(run / "checkpoints")
    assert found is not None
    return found


def test_both_formats_hold_the_same(runs: dict[str, Path]) -> None:
    one, two = (checkpoint.read(newest(run)) for run in runs.values())
    for stem in checkpoint.TENSOR_FILES:
        assert one.tensors[stem].keys() == two.tensors[stem].keys()
        for name, tensor in one.tensors[stem].items():
            assert tensor.shape == two.tensors[stem][name].shape, name
            assert torch.equal(tensor, two.tensors[stem][name]), name
    whole = newest(runs["whole"]) / "ema.safetensors"
    assert load_file(whole).keys() == load_file(newest(runs["sharded"]) / "ema.safetensors").keys()
    names = {path.name for path in newest(runs["sharded"]).iterdir()}
    assert names == {"ema.safetensors", "files.json", "shard-00001-model-00001-of-00001.safetensors", "state.json"}


@pytest.mark.parametrize("average", [True, False])
def test_both_formats_load(runs: dict[str, Path], average: bool) -> None:
    one, two = (sivae_dist.load(run, average=average) for run in runs.values())
    assert torch.equal(one.sample(4), two.sample(4))


def test_a_run_may_change_its_format(runs: dict[str, Path], tmp_path: Path) -> None:
    """whole, then sharded, then whole: as one run that never stopped."""
    for kimg, format in ((0.1, "whole"), (0.2, "sharded"), (0.3, "whole")):
        run = train(settings(format, kimg), tmp_path / "run")
    plain = train(settings("whole", 0.3), tmp_path / "plain")
    for stem in checkpoint.TENSOR_FILES:
        one, two = (newest(r) / f"{stem}.safetensors" for r in (run, plain))
        assert one.read_bytes() == two.read_bytes()


def test_scalars_and_memory_formats_survive(tmp_path: Path) -> None:
    """Counters of batch norm are scalars; convolutions may lie channels last."""
    config = from_dict({"model": RESIDUAL}, "test")
    model, other = (config.model.build().to(memory_format=torch.channels_last) for _ in range(2))
    writer = checkpoint_sharded.ShardedWriter(settings("sharded", 1).checkpoint, tmp_path)
    writer.take(5, model, model, Replicated({}, {}), {"plan_salt": 0})
    writer.close()
    saved = checkpoint.read(newest_in(tmp_path), parts=False)
    checkpoint_sharded.restore(saved, other, other, Replicated({}, {}))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def newest_in(folder: Path) -> Path:
    found = checkpoint.latest(folder)
    assert found is not None
    return found


def signed(path: Path) -> None:
    """Makes the list of files agree with files that were changed."""
    files = [file for file in path.iterdir() if file.name != "files.json"]
    listing = {f.name: {"bytes": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()} for f in files}
    (path / "files.json").write_text(json.dumps(listing))


@pytest.fixture
def damaged(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint in parts, to damage."""
    import shutil

    return Path(shutil.copytree(newest(runs["sharded"]), tmp_path / newest(runs["sharded"]).name))


def part(path: Path) -> Path:
    (found,) = path.glob("shard-*")
    return found


def test_damage_is_told(damaged: Path) -> None:
    assert checkpoint.damage(damaged) == []
    data = bytearray(part(damaged).read_bytes())
    data[-3] ^= 1
    part(damaged).write_bytes(data)
    assert "other bytes" in checkpoint.damage(damaged)[0]
    with pytest.raises(UserError, match="differs from what was written"):
        checkpoint.read(damaged, parts=False)
    part(damaged).unlink()
    assert "is missing" in checkpoint.damage(damaged)[0]


@pytest.mark.parametrize("metadata", ["{", "[1]", json.dumps({"x": 3}), None])
def test_hostile_headers_with_right_checksums(damaged: Path, metadata: str | None) -> None:
    tensors = load_file(part(damaged))
    save_file(tensors, part(damaged), metadata={"DCP_SHARDING_INFO": metadata} if metadata else None)
    signed(damaged)
    if metadata is None:  # then each part counts as whole, which this one is
        assert checkpoint.damage(damaged) == []
    else:
        with pytest.raises(UserError, match="cannot read the parts"):
            checkpoint.read(damaged)


def test_parts_that_do_not_make_up_the_whole(damaged: Path) -> None:
    tensors = load_file(part(damaged))
    name = next(n for n, t in tensors.items() if t.dim() == 2 and n.startswith("weights/"))
    offsets = {n: {"saved_offsets": [2] * t.dim() if n == name else [0] * t.dim()} for n, t in tensors.items()}
    save_file(tensors, part(damaged), metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
    signed(damaged)
    with pytest.raises(UserError, match=r"elements of weights/"):
        checkpoint.read(damaged)


def test_a_pickle_beside_the_parts_is_not_read(damaged: Path) -> None:
    """torch's own format keeps a pickled .metadata file."""

    class Runs:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("executed",))

    (damaged / ".metadata").write_bytes(pickle.dumps(Runs()))
    checkpoint.read(damaged)
    signed(damaged)
    with pytest.raises(UserError, match="does not list the files of a checkpoint"):
        checkpoint.read(damaged)


def test_a_write_that_fails_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("in the way")
    with pytest.raises(OSError, match="taken"):
        parts.write(tmp_path / "taken", {"a": torch.zeros(3)}, Group())


def probe(ranks: int, what: str, kind: str, run: Path) -> dict[str, Any]:
    done = accelerate_launch(ranks, PROBE, what, kind, str(run), timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return told


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("saves", "loads"),
    [(("ddp", 2), [("fsdp", 3), ("ddp", 1)]), (("fsdp", 3), [("ddp", 1), ("fsdp", 2), ("ddp", 2)])],
)
def test_any_ranks_and_strategy_read_what_others_wrote(
    saves: tuple[str, int], loads: list[tuple[str, int]], tmp_path: Path
) -> None:
    """Every bit of weights, averages and moments, and of all three after the next step."""
    told = probe(saves[1], "save", saves[0], tmp_path)
    assert len(list(newest_in(tmp_path / "checkpoints").glob("shard-*"))) == saves[1]
    assert checkpoint.damage(newest_in(tmp_path / "checkpoints")) == []
    for kind, ranks in loads:
        assert probe(ranks, "load", kind, tmp_path) == told, (kind, ranks)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_killed_while_it_writes_leaves_the_one_before(dies: int, tmp_path: Path) -> None:
    values = {**SETTINGS, "checkpoint": {**SETTINGS["checkpoint"], "format": "sharded"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    given = ["--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]
    script = str(Path(__file__).with_name("dies_in_parts.py"))
    done = accelerate_launch(2, script, *given, timeout=240, env={"DIES": str(dies)})
    assert done.returncode != 0
    folder = tmp_path / "run/checkpoints"
    assert [path.name for path in checkpoint.all_of(folder)] == ["nimg-000000100"]
    assert (folder / ".nimg-000000200.tmp").is_dir()
    assert checkpoint.damage(newest_in(folder)) == []
    train(settings("sharded", 0.3, model=SETTINGS["model"]), tmp_path / "run")
    assert newest_in(folder).name == "nimg-000000300"
    assert not list(folder.glob(".nimg*"))


@pytest.mark.dist
@pytest.mark.slow
def test_a_training_on_other_ranks_and_strategies_each_time(tmp_path: Path) -> None:
    """ddp on 2 ranks, fsdp2 on 3, one alone: the course of a run that never stopped, up to rounding."""
    config = tmp_path / "config.yaml"
    values = {**SETTINGS, "tracking": {**SETTINGS["tracking"], "fingerprints_every_kimg": 0.05}}
    checkpoints = {**SETTINGS["checkpoint"], "format": "sharded", "keep_last": 3}
    config.write_text(yaml.safe_dump({**values, "checkpoint": checkpoints}))
    given = ["-m", "sivae_dist.train", "--config", str(config)]
    run = tmp_path / "run"
    for ranks, strategy, kimg in ((2, "ddp", 0.1), (3, "fsdp2", 0.2), (1, "ddp", 0.3)):
        options = ["--out", str(run), "--distributed.strategy", strategy, "--train.kimg", str(kimg)]
        done = accelerate_launch(ranks, *given, *options, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
    alone = train(settings("whole", 0.3, model=SETTINGS["model"], tracking=values["tracking"]), tmp_path / "alone")
    found = diff(alone, run, 1e-5)
    assert found.verdict == "rounding", summary(found)
    assert [step.nimg for step in found.steps] == [0, 50, 100, 150, 200, 250, 300]
    parts_of = {p.name: len(list(p.glob("shard-*"))) for p in checkpoint.all_of(run / "checkpoints")}
    assert parts_of == {"nimg-000000100": 2, "nimg-000000200": 3, "nimg-000000300": 1}
    assert not any(checkpoint.damage(path) for path in checkpoint.all_of(run / "checkpoints"))

"""`sivae-dist checkpoint list | verify | prune` on a run folder with six checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sivae_dist.cli import main
from sivae_dist.engine import checkpoint
from sivae_dist.engine.checkpoint_writer import CheckpointConfig, CheckpointWriter, best_checkpoint, kept
from sivae_dist.engine.config import from_dict, to_dict, to_yaml
from sivae_dist.engine.run_lock import RunLock

PSNR = {100: 11.0, 200: 14.0, 300: 12.0, 400: None, 500: 13.0, 600: 12.5}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Nothing was removed while it trained; its settings keep the last two and the best."""
    values = {"model": {"name": "mlp", "width": 4, "hidden_layers": 1}, "data": {"name": "toy2d"}}
    config = from_dict(values, "test")
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    model = config.model.build()
    for nimg, psnr in PSNR.items():
        metrics = {} if psnr is None else {"eval/psnr": psnr}
        state = {"plan_salt": 0, "sums": {}, "data": "d", "config": to_dict(config), "metrics": metrics}
        checkpoint.write(folder / "checkpoints", checkpoint.snapshot(nimg, model, model, {}, state))
    return folder


@pytest.mark.parametrize("tagged", [True, False], ids=["told", "older"])
def test_the_best_one_of_a_growing_run_has_the_highest_resolution(tmp_path: Path, tagged: bool) -> None:
    """Images of 4 px are easy: their PSNR would be the best for ever."""
    growth = {"enabled": True, "level_kimg": 0.1, "fade_kimg": 0.05}
    model = {"name": "style", "image_size": 16, "startf": 4, "maxf": 6, "latent_size": 5, "mapping_layers": 2}
    state = {"config": to_dict(from_dict({"model": model, "progressive": growth}, "test"))}
    for nimg, psnr, size in ((100, 40.0, 4), (200, 30.0, 8), (220, 21.0, 16), (300, 22.0, 16), (320, 20.0, 16)):
        path = tmp_path / checkpoint.name_of(nimg)
        path.mkdir()
        tag = {"eval/resolution": float(size)} if tagged else {}
        (path / "state.json").write_text(json.dumps({**state, "metrics": {"eval/psnr": psnr, **tag}}))
    found = sorted(tmp_path.iterdir())
    best = [best_checkpoint(CheckpointConfig(), found[:n]) for n in range(6)]
    assert [path and checkpoint.nimg_of(path) for path in best] == [None, 100, 200, 220, 300, 300]
    assert best_checkpoint(CheckpointConfig(best_is="min"), found) == found[-1]
    assert found[3] in kept(CheckpointConfig(keep_last=1), found, found[-1])


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def call(*arguments: object) -> tuple[int, str]:
        status = 0
        try:
            main(["checkpoint", *map(str, arguments)])
        except SystemExit as left:
            status = int(left.code or 0)
        said = capsys.readouterr()
        return status, said.out + said.err

    return call


def names(run: Path) -> list[int]:
    return [checkpoint.nimg_of(path) for path in checkpoint.all_of(run / "checkpoints")]


def at(run: Path, nimg: int) -> Path:
    return run / "checkpoints" / checkpoint.name_of(nimg)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def test_list(run: Path, command: Any) -> None:
    cut(at(run, 300) / "ema.safetensors")
    flip(at(run, 400) / "ema.safetensors")  # the sizes tell nothing of it
    status, said = command("list", run)
    lines = said.splitlines()
    assert status == 0 and len(lines) == 7
    assert "0.200 kimg" in lines[1] and "best eval/psnr" in lines[1] and "eval/psnr 14" in lines[1]
    assert "damaged" in lines[2] and "ema.safetensors has" in lines[3]
    assert "latest" in lines[-1] and sum("latest" in line for line in lines) == 1
    rows = json.loads(command("list", run, "--json")[1])
    assert [row["good"] for row in rows] == [True, True, False, True, True, True]
    assert rows[0]["bytes"] == sum(file.stat().st_size for file in at(run, 100).iterdir())


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: flip(p / "optimizer.safetensors"), "optimizer.safetensors has other bytes"),
        (lambda p: cut(p / "weights.safetensors"), "were written"),
        (lambda p: (p / "ema.safetensors").unlink(), "ema.safetensors is missing"),
        (lambda p: (p / "files.json").unlink(), "files.json"),
        (lambda p: (p / "files.json").write_text("[]"), "expected keys and values"),
        (lambda p: (p / "state.json").write_text("{"), "cannot be read"),
    ],
)
def test_verify(run: Path, command: Any, damage: Callable[[Path], None], says: str) -> None:
    assert command("verify", run)[0] == 0
    damage(at(run, 500))
    status, said = command("verify", run)
    assert status == 1
    assert said.count(": good (") == 5 and says in said
    assert command("verify", at(run, 400))[0] == 0
    status, said = command("verify", run, "--json")
    assert status == 1 and [row["good"] for row in json.loads(said)].count(False) == 1


def test_verify_reads_what_a_resume_reads(run: Path, command: Any) -> None:
    """Right checksums around a state that no run can go on from."""
    import hashlib

    state = at(run, 500) / "state.json"
    state.write_text(state.read_text().replace('"nimg": 500', '"nimg": -5'))
    listing = json.loads((at(run, 500) / "files.json").read_text())
    listing["state.json"] = {"bytes": state.stat().st_size, "sha256": hashlib.sha256(state.read_bytes()).hexdigest()}
    (at(run, 500) / "files.json").write_text(json.dumps(listing))
    status, said = command("verify", at(run, 500))
    assert status == 1 and "has nimg = -5" in said


@pytest.mark.parametrize(
    ("options", "stay"),
    [
        ((), [200, 500, 600]),
        (("--keep-last", 1), [200, 600]),
        (("--keep-last", 1, "--best", "none"), [600]),
        (("--keep-last", 1, "--best-is", "min"), [100, 600]),
        (("--keep-last", 1, "--best", "none", "--keep-every-kimg", 0.2), [200, 400, 600]),
    ],
)
def test_prune(run: Path, command: Any, options: tuple[object, ...], stay: list[int]) -> None:
    status, said = command("prune", run, *options, "--dry-run")
    assert status == 0 and said.count("would remove") == 6 - len(stay)
    assert names(run) == list(PSNR)
    assert command("prune", run, *options)[0] == 0
    assert names(run) == stay
    assert not list((run / "checkpoints").glob(".*"))
    assert command("verify", run)[0] == 0


def test_prune_takes_what_killed_processes_left(run: Path, command: Any) -> None:
    left = [run / "checkpoints" / name for name in (".nimg-000000017.tmp", ".nimg-000000018.deleted")]
    for path in left:
        path.mkdir()
        (path / "weights.safetensors").write_bytes(bytes(10 << 20))
    keep_all = ("--keep-last", 6)
    status, said = command("prune", run, *keep_all, "--dry-run")
    assert status == 0 and said.count("would remove") == 2 and "20 MiB would be free" in said
    assert all(path.is_dir() for path in left)
    assert command("prune", run, *keep_all)[0] == 0
    assert not any(path.exists() for path in left)
    assert names(run) == list(PSNR)


def test_prune_does_as_the_training_does(run: Path, command: Any, tmp_path: Path) -> None:
    writer = CheckpointWriter(CheckpointConfig(background=False), tmp_path / "kept")
    for path in checkpoint.all_of(run / "checkpoints"):
        writer.save(checkpoint.read(path))
    command("prune", run)
    assert sorted(p.name for p in (tmp_path / "kept").glob("nimg-*")) == [
        p.name for p in checkpoint.all_of(run / "checkpoints")
    ]


def test_newer_ones_than_the_latest_are_of_another_course() -> None:
    """After --resume OLDER they take no place among the last ones, so that the new course's own are kept."""
    found = [Path(f"nimg-{n:09d}") for n in (50, 60, 70, 90, 100)]
    config = CheckpointConfig(keep_last=2, best=None)
    assert list(kept(config, found, found[2])) == [found[2], found[1]]
    assert list(kept(config, found, None)) == found[-2:]


def test_prune_never_takes_the_latest_good_one(run: Path, command: Any) -> None:
    """The newest two are damaged, so the one before them is what a run can go on from."""
    flip(at(run, 600) / "weights.safetensors")
    cut(at(run, 500) / "state.json")
    status, said = command("prune", run, "--keep-last", 1, "--best", "none", "--json")
    told = json.loads(said)
    assert status == 0 and told["keeps"] == {"nimg-000000400": "latest, last"}
    assert told["damaged"] == ["nimg-000000500", "nimg-000000600"]
    assert names(run) == [400, 500, 600]
    assert checkpoint.latest(run / "checkpoints") == at(run, 400)
    assert command("prune", run, "--keep-last", 1, "--best", "none", "--damaged")[0] == 0
    assert names(run) == [400]


def test_prune_by_the_run_s_own_settings_or_not_at_all(run: Path, command: Any) -> None:
    """The newest five are to stay; by the default settings two more would go."""
    file = run / "config.yaml"
    told = file.read_text().replace("keep_last: 2", "keep_last: 5")
    file.write_text(told.replace("model:\n", "model:\n  of_another_version: 1\n", 1))
    assert "of_another_version" in file.read_text()
    status, said = command("prune", run, "--dry-run")
    assert status == 0 and said.count("would remove") == 1, said

    whole = ("--keep-last", 1, "--keep-every-kimg", 0, "--best", "eval/psnr")
    for text, says in [
        (told.replace("keep_last: 5", "keep_lats: 5"), "did you mean 'keep_last'"),
        (told.replace("keep_last: 5", "keep_last: five"), "checkpoint.keep_last is 'five'"),
        ("", "has no section checkpoint"),
        ("a: [", "is not valid YAML"),
    ]:
        file.write_text(text)
        status, said = command("prune", run, *whole)
        assert status == 2 and says in said and "add --best-is" in said
        assert names(run) == list(PSNR)
    status, said = command("list", run)
    assert status == 0 and "note: the run's settings cannot be read" in said and "best eval/psnr" in said
    assert command("prune", run, *whole, "--best-is", "max")[0] == 0
    assert names(run) == [200, 600]


def test_prune_without_a_config_file_does_as_the_latest_checkpoint_says(run: Path, command: Any) -> None:
    (run / "config.yaml").unlink()
    for path in checkpoint.all_of(run / "checkpoints"):
        saved = checkpoint.read(path)
        checkpoint.remove(path)
        saved.state["config"]["checkpoint"]["keep_last"] = 4
        checkpoint.write(run / "checkpoints", saved)
    assert command("prune", run)[0] == 0
    assert names(run) == [200, 300, 400, 500, 600]
    (at(run, 600) / "state.json").write_text("{}")
    status, said = command("prune", run)
    assert status == 2 and "holds no configuration" in said
    assert command("prune", run, "--keep-last", 1, "--keep-every-kimg", 0, "--best", "none")[0] == 0
    assert names(run) == [500, 600], "the damaged one stays to be looked at"


def test_what_is_refused(run: Path, command: Any, tmp_path: Path) -> None:
    for words in ("list", "verify", "prune"):
        status, said = command(words, tmp_path / "nothing")
        assert status == 2 and "there is no checkpoint in" in said
    assert command("prune", run, "--keep-last", 0)[0] == 2
    lock = RunLock(run)
    try:
        status, said = command("prune", run)
        assert status == 2 and "another run is going on" in said
    finally:
        lock.release()
    assert names(run) == list(PSNR)


def test_torch_is_not_asked_to_unpickle(run: Path, monkeypatch: pytest.MonkeyPatch, command: Any) -> None:
    monkeypatch.setattr(torch, "load", None)
    assert command("verify", run)[0] == 0

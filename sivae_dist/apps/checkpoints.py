"""Looking after the checkpoints of a run: what there is, whether it is whole, and what may go."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sivae_dist.engine import checkpoint
from sivae_dist.engine.checkpoint_writer import CheckpointConfig, best_checkpoint, kept
from sivae_dist.engine.config import checkpoint_section, read_yaml
from sivae_dist.engine.run_folder import RunFolder
from sivae_dist.engine.run_lock import RunLock
from sivae_dist.errors import UserError
from sivae_dist.files import write_atomically


@dataclass(frozen=True)
class Entry:
    """A checkpoint. damage: what is wrong with it, nothing where it is good. why: what makes it special."""

    path: Path
    nimg: int
    bytes: int
    metrics: dict[str, float]
    damage: list[str]
    why: list[str]


def settings_of(run: Path) -> CheckpointConfig:
    """The retention of the run's config.yaml, or without that file of its latest checkpoint.

    Only the section `checkpoint` is looked at: what is wrong with the others says nothing of it. Raises UserError where
    it cannot be read, as what the run wants to keep is not known then.
    """
    file = RunFolder(run).config
    if file.is_file():
        return checkpoint_section(read_yaml(file), str(file))
    latest = checkpoint.latest(RunFolder(run).checkpoints)
    if latest is None:
        raise UserError(f"{run} has neither a config.yaml nor a complete checkpoint", "restore its config.yaml")
    config = checkpoint.read_state(latest).get("config")
    where = str(latest / "state.json")
    if not isinstance(config, dict):
        raise UserError(f"{where} holds no configuration, and there is no {file}", "restore one of them")
    return checkpoint_section(config, where)


def retention(run: Path, given: dict[str, Any]) -> CheckpointConfig:
    """What is to stay: by the run's settings, or where `given` (of keep_last, keep_every_kimg, best, best_is) says so.

    Raises UserError where the settings cannot be read and `given` leaves some of them open: by the default ones things
    might go that the run was told to keep.
    """
    _folder(run)
    try:
        config = settings_of(run)
    except UserError as error:
        needed = ["keep_last", "keep_every_kimg", "best"]
        needed += ["best_is"] if given.get("best", "") is not None else []
        if missing := [f"--{name.replace('_', '-')}" for name in needed if name not in given]:
            what = f"what the run wants to keep is not known: {error.what}"
            raise UserError(what, f"{error.fix or 'mend it'}; or say it all here: add {', '.join(missing)}") from None
        config = CheckpointConfig()
    return replace(config, **given)


def found_in(path: Path) -> list[Path]:
    """The checkpoints of a run folder, complete or not, or the one that `path` is. Raises UserError if there is none.

    A run's folder of checkpoints will do, too.
    """
    if (path / "files.json").is_file() or (path / "state.json").is_file():
        return [path]
    for folder in (RunFolder(path).checkpoints, path):
        found = checkpoint.all_of(folder)
        if found:
            return found
    raise UserError(f"there is no checkpoint in {path}", "give a run folder or one of its checkpoints")


def entries(path: Path, *, thorough: bool, tell: Callable[[str], object]) -> list[Entry]:
    """Those of a run, or one of them, oldest first. thorough: read every byte, not only the sizes.

    tell: is told when the run's settings cannot be read, and the best one is that by the default settings.
    """
    paths = found_in(path)
    folder = paths[0].parent
    try:
        config = settings_of(folder.parent)
    except UserError as error:
        config = CheckpointConfig()
        tell(f"the run's settings cannot be read, so the best is the one by {config.best}: {error.what}")
    damage = {p: checkpoint.damage(p, sizes_only=not thorough) for p in paths}
    good = [p for p in checkpoint.complete(folder) if not damage.get(p)]
    latest, best = checkpoint.latest(folder), best_checkpoint(config, good)
    result = []
    for p in paths:
        why = ["latest"] * (p == latest) + [f"best {config.best}"] * (p == best)
        size = sum(file.stat().st_size for file in p.rglob("*") if file.is_file())
        result.append(Entry(p, checkpoint.nimg_of(p), size, _metrics(p), damage[p], why))
    return result


def _metrics(path: Path) -> dict[str, float]:
    try:
        values = json.loads((path / "state.json").read_text(encoding="utf-8"))["metrics"]
        return {str(name): float(value) for name, value in values.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


@dataclass(frozen=True)
class Pruning:
    """What a pruning keeps, and why; what it removes, of which some may be parts that a killed process left; damaged
    ones that stay because they were not asked for.
    """

    keeps: dict[Path, str]
    removes: list[Path]
    damaged: list[Path]
    bytes: int  # that removing gives back


def prune(run: Path, config: CheckpointConfig, *, damaged: bool, dry_run: bool) -> Pruning:
    """Removes what `config` does not keep; always keeps the latest good one. damaged: removes damaged ones, too.

    Raises UserError while a training is going on in the run folder.
    """
    folder = _folder(run)
    lock = RunLock(run)
    try:
        return _prune(folder, config, damaged=damaged, dry_run=dry_run)
    finally:
        lock.release()


def _folder(run: Path) -> Path:
    folder: Path = RunFolder(run).checkpoints
    if not checkpoint.all_of(folder):
        raise UserError(f"there is no checkpoint in {run}", "give a run folder, as --out of the training named it")
    return folder


def _prune(folder: Path, config: CheckpointConfig, *, damaged: bool, dry_run: bool) -> Pruning:
    found = checkpoint.all_of(folder)
    bad = [path for path in found if checkpoint.damage(path)]  # only what was read whole counts as kept
    good = [path for path in found if path not in bad]
    latest = checkpoint.latest(folder)
    resume_from = latest if latest in good else good[-1] if good else None
    keeps = kept(config, good, resume_from)
    removes = [path for path in good if path not in keeps] + (bad if damaged else [])
    left = checkpoint.debris(folder)
    size = sum(file.stat().st_size for path in removes + left for file in path.rglob("*") if file.is_file())
    if not dry_run:
        if resume_from is not None and latest != resume_from:  # before what it names goes
            write_atomically(folder / "latest", resume_from.name + "\n")
        for path in removes:
            checkpoint.remove(path)
        checkpoint.sweep(folder)
    return Pruning(keeps, left + removes, [] if damaged else bad, size)

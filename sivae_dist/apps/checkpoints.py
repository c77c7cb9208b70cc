"""Looking after the checkpoints of a run: what there is, whether it is whole, and what may go."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sivae_dist.engine import checkpoint
from sivae_dist.engine.checkpoint_writer import CheckpointConfig, best_checkpoint, kept
from sivae_dist.engine.config import from_dict, read_yaml
from sivae_dist.engine.run_folder import RunFolder, write_atomic
from sivae_dist.engine.run_lock import RunLock
from sivae_dist.errors import UserError


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
    """The retention that the run was trained with; the default one where its config cannot be read."""
    file = RunFolder(run).config
    try:
        return from_dict(read_yaml(file), str(file)).checkpoint if file.is_file() else CheckpointConfig()
    except UserError:
        return CheckpointConfig()


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


def entries(path: Path, *, thorough: bool) -> list[Entry]:
    """Those of a run, or one of them, oldest first. thorough: read every byte, not only the sizes."""
    paths = found_in(path)
    folder = paths[0].parent
    config = settings_of(folder.parent)
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
    """What a pruning keeps, and why; what it removes; damaged ones that stay because they were not asked for."""

    keeps: dict[Path, str]
    removes: list[Path]
    damaged: list[Path]
    bytes: int  # that removing gives back


def prune(run: Path, config: CheckpointConfig, *, damaged: bool, dry_run: bool) -> Pruning:
    """Removes what `config` does not keep; always keeps the latest good one. damaged: removes damaged ones, too.

    Raises UserError while a training is going on in the run folder.
    """
    folder = RunFolder(run).checkpoints
    if not checkpoint.all_of(folder):
        raise UserError(f"there is no checkpoint in {run}", "give a run folder, as --out of the training named it")
    lock = RunLock(run)
    try:
        return _prune(folder, config, damaged=damaged, dry_run=dry_run)
    finally:
        lock.release()


def _prune(folder: Path, config: CheckpointConfig, *, damaged: bool, dry_run: bool) -> Pruning:
    found = checkpoint.all_of(folder)
    bad = [path for path in found if checkpoint.damage(path)]  # only what was read whole counts as kept
    good = [path for path in found if path not in bad]
    latest = checkpoint.latest(folder)
    resume_from = latest if latest in good else good[-1] if good else None
    keeps = kept(config, good, resume_from)
    removes = [path for path in good if path not in keeps] + (bad if damaged else [])
    size = sum(file.stat().st_size for path in removes for file in path.rglob("*") if file.is_file())
    if not dry_run:
        if resume_from is not None and latest != resume_from:  # before what it names goes
            write_atomic(folder / "latest", resume_from.name + "\n")
        for path in removes:
            checkpoint.remove(path)
    return Pruning(keeps, removes, [] if damaged else bad, size)

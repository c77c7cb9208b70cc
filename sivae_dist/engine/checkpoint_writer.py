"""When checkpoints are written, by whom, and which are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from torch import nn

from sivae_dist.distributed.group import Group
from sivae_dist.distributed.strategy import Strategy
from sivae_dist.engine import checkpoint
from sivae_dist.engine.checkpoint import Snapshot
from sivae_dist.errors import UserError


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints and which of them stay."""

    every_kimg: float = 50.0
    """A checkpoint every this many thousand images, and always at the end and when the run is asked to stop."""
    keep_last: int = 2
    """The newest ones are kept, at least one. (Those newer than where a run was resumed by --resume PATH are not: they
    belong to a course that was given up.)"""
    keep_every_kimg: float = 0.0
    """Besides those, one every this many thousand images stays for ever. 0 keeps none for that reason."""
    best: str | None = "eval/psnr"
    """The checkpoint with the best value of this metric is kept too, of a network that grows among those evaluated at
    the highest resolution. None keeps none for that reason."""
    best_is: str = "max"
    """max or min: which value of `best` is the better one."""
    background: bool = True
    """Write in a thread while training goes on."""
    format: Literal["whole", "sharded"] = "whole"
    """whole: rank 0 gathers and writes everything. sharded: every rank writes the part it holds, and averaged weights
    are put together afterwards. Either resumes on any number of ranks, under any strategy."""

    def __post_init__(self) -> None:
        if self.every_kimg <= 0 or self.keep_last < 1 or self.keep_every_kimg < 0:
            raise UserError(
                f"checkpoint: every_kimg {self.every_kimg}, keep_last {self.keep_last}, "
                f"keep_every_kimg {self.keep_every_kimg} are not all in range",
                "every_kimg must be positive, keep_last at least 1, keep_every_kimg at least 0",
            )
        if self.best_is not in {"max", "min"}:
            raise UserError(f"checkpoint.best_is is {self.best_is!r}", "use max or min")


class CheckpointWriter:
    """Writes checkpoints one after the other, in a thread if configured, and removes those no longer wanted."""

    def __init__(self, config: CheckpointConfig, folder: Path, group: Group | None = None) -> None:
        self.config, self.folder, self.group = config, folder, group or Group()
        self._thread = ThreadPoolExecutor(1, "checkpoint") if config.background else None
        self._pending: Future[None] | None = None

    def save(self, saved: Snapshot) -> None:
        """Begins writing (waits for the previous one first, whose failure is raised here).

        saved.state["metrics"] holds what was evaluated at exactly this nimg; it decides which checkpoint is the best.
        """
        self.begin(saved.nimg, lambda: checkpoint.write(self.folder, saved))

    def take(self, nimg: int, model: nn.Module, ema: nn.Module, strategy: Strategy, state: dict[str, Any]) -> None:
        """Copies the training state and begins writing it. Called on all ranks; collective."""
        saved = checkpoint.snapshot(nimg, model, ema, strategy, state, keep=self.group.is_main)
        if self.group.is_main:
            self.save(saved)

    def begin(self, nimg: int, write: Callable[[], object]) -> None:
        """As `save`, by calling `write`."""
        self.wait()
        if self._thread is None:
            self._write(nimg, write)
        else:
            self._pending = self._thread.submit(self._write, nimg, write)

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Returns when nothing is being written. Raises what the writing raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def raise_failure(self) -> None:
        """Raises what the writing raised, if it has ended by now: a run should not train on for nothing."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def close(self) -> None:
        """Waits for the last checkpoint and ends the thread."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    def _write(self, nimg: int, write: Callable[[], object]) -> None:
        try:
            write()
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot write the checkpoint of {nimg} images into {self.folder}: {error}",
                "make room (or check permissions) and run the same command again: it resumes from the one before",
            ) from error
        if self.group.is_main:
            self._prune()

    def _prune(self) -> None:
        found = checkpoint.complete(self.folder)
        keep = kept(self.config, found, checkpoint.latest(self.folder))
        for path in found:
            if path not in keep:
                checkpoint.remove(path)


def kept(config: CheckpointConfig, found: list[Path], latest: Path | None) -> dict[Path, str]:
    """Those of the checkpoints (oldest first) that stay, and why. latest: the one to resume from.

    Newer ones than that are left from a course that was given up: only the best one of them may stay.
    """
    keep: dict[Path, list[str]] = {}

    def stays(path: Path, why: str) -> None:
        keep.setdefault(path, []).append(why)

    if latest is not None:
        stays(latest, "latest")
    best = best_checkpoint(config, found)
    if best is not None:
        stays(best, f"best {config.best}")
    if latest is not None:
        found = [path for path in found if checkpoint.nimg_of(path) <= checkpoint.nimg_of(latest)]
    for path in found[-config.keep_last :]:
        stays(path, f"last {config.keep_last}" if config.keep_last > 1 else "last")
    if config.keep_every_kimg > 0:
        first_of_slot: dict[int, Path] = {}
        for path in found:
            slot = int(checkpoint.nimg_of(path) / (config.keep_every_kimg * 1000))
            first_of_slot.setdefault(slot, path)
        for number, path in first_of_slot.items():
            if number > 0:
                stays(path, f"every {config.keep_every_kimg:g} kimg")
    return {path: ", ".join(reasons) for path, reasons in keep.items()}


def best_checkpoint(config: CheckpointConfig, found: list[Path]) -> Path | None:
    """The checkpoint whose stored metrics have the best value of `config.best`; None when none was evaluated.

    Only those evaluated at the highest resolution of all count: images of a few pixels are easy.
    """
    from sivae_dist.engine.config import from_dict  # noqa: PLC0415 (which imports CheckpointConfig from here)
    from sivae_dist.engine.resolution import Resolutions  # noqa: PLC0415

    judged: list[tuple[float, dict[str, Any], Path]] = []
    told: Any = {}  # the newest one's configuration; how a run grows cannot change
    for path in found:
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            metrics = dict(state["metrics"])
            value = metrics[config.best]
        except (OSError, ValueError, LookupError, TypeError):  # not evaluated, or damaged
            continue
        if isinstance(value, int | float) and math.isfinite(value):
            judged.append((float(value), metrics, path))
            told = state.get("config", {})
    try:
        resolutions = Resolutions(from_dict(told, "state.json"))
        pixels = [resolutions.of(checkpoint.nimg_of(path), metrics) for _, metrics, path in judged]
    except UserError:  # of another version; all count
        pixels = [0] * len(judged)
    highest = max(pixels, default=0)
    scores = [(value, path) for (value, _, path), size in zip(judged, pixels, strict=True) if size == highest]
    if not scores:
        return None
    choose = max if config.best_is == "max" else min
    return choose(scores, key=lambda pair: pair[0])[1]

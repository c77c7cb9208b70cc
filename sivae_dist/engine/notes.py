"""What a user should know before a run begins: settings that change nothing, checkpoints that will go."""

from __future__ import annotations

import sys

from sivae_dist.engine import resume
from sivae_dist.engine.config import RunConfig
from sivae_dist.engine.logs import log
from sivae_dist.engine.optim import PlayerOptim
from sivae_dist.engine.run_folder import RunFolder
from sivae_dist.engine.schedule import TrainConfig

_EVER = 1 << 62  # images


def before(config: RunConfig, levels: int, folder: RunFolder, nimg: int) -> list[str]:
    """A line each. levels: of the model; nimg: images after which the run goes on."""
    notes = unused(config, levels)
    if left := resume.left_behind(folder, nimg):
        names = ", ".join(path.name for path in left)
        notes.append(
            f"going on from {nimg} images: the next checkpoint removes the newer ones in {folder.checkpoints} (but the "
            f"best one), which belong to a course that is given up: {names}. Copy first what you want to keep"
        )
    return notes


def tell(notes: list[str], *, main: bool) -> None:
    """Into every rank's log, and from one rank to the terminal."""
    for note in notes:
        log.warning(note)
        if main:
            print(f"note: {note}", file=sys.stderr, flush=True)


def unused(config: RunConfig, levels: int) -> list[str]:
    """A line for each setting that was changed while growth puts other values in its place."""
    growth = config.progressive
    if not growth.enabled:
        return []
    last = growth.at(_EVER, levels)
    # Name, its value, its default, what holds at the last level, and the name of what does.
    rows: list[tuple[str, float, float, float, str]] = [
        ("train.batch", config.train.batch, TrainConfig().batch, last.batch, "batch"),
        ("optim.encoder.lr", config.optim.encoder.lr, PlayerOptim().lr, last.lr, "lr"),
        ("optim.decoder.lr", config.optim.decoder.lr, PlayerOptim().lr, last.lr, "lr"),
    ]
    strength = getattr(config.objective, "beta_neg", None)
    if strength is not None:
        default = getattr(type(config.objective)(), "beta_neg")  # noqa: B009 (not every objective has one)
        rows.append(("objective.beta_neg", strength, default, last.beta_neg, "beta_neg"))
    return [
        f"{name} {value:g} changes nothing while progressive.enabled is True: progressive.{instead} holds "
        f"({at_end:g} at the last level)"
        for name, value, default, at_end, instead in rows
        if value not in (default, at_end)
    ]

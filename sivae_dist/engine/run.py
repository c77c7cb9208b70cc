"""`train`: a run from its configuration to its end, or a rehearsal of it."""

from __future__ import annotations

from pathlib import Path

from sivae_dist.engine.config import RunConfig
from sivae_dist.engine.logs import rank_log
from sivae_dist.engine.trainer import Trainer


def train(config: RunConfig, out: str | Path, resume_from: str = "auto", *, dry_run: bool = False) -> Path:
    """Trains until config.train.kimg thousand images are seen, or until asked to stop. Returns the run folder.

    resume_from: "auto" (the run's latest checkpoint, if there is one), "never" (the folder must hold no run), or the
    path of a checkpoint. dry_run: one step of each phase and a report instead, nothing is written.
    Raises UserError for everything that the user can mend.
    """
    trainer = Trainer(config, out, resume_from, writes=not dry_run)
    try:
        if dry_run:
            from sivae_dist.engine.dry_run import dry_run as rehearse  # noqa: PLC0415 (seldom needed)

            rehearse(trainer)
        else:
            with rank_log(trainer.folder.logs, trainer.group.rank):
                finished = trainer.run()
            if trainer.group.is_main and not finished:
                print(f"stopped at {trainer.nimg / 1000:.3f} kimg; the same command goes on from here")
    finally:
        trainer.release()
    return trainer.folder.root

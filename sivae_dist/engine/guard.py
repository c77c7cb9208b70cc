"""Numbers that are no numbers: counted, reported by name and rank, never stepped on and never hidden."""

from __future__ import annotations

import sys

import torch

from sivae_dist.distributed.group import Group
from sivae_dist.engine.iteration import IterationReport
from sivae_dist.errors import UserError

PATIENCE = 10  # skipped iterations in a row before the run is stopped


class Guard:
    """Watches the reports of iterations. An iteration with a non-finite gradient has already skipped its step."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.nonfinite = self.skipped = self.in_a_row = 0

    def check(self, report: IterationReport, nimg: int) -> None:
        """Counts and reports a skipped iteration (the same on all ranks); raises UserError after PATIENCE in a row."""
        if not report.skipped:
            self.in_a_row = 0
            return
        self.skipped += len(report.skipped)
        self.in_a_row += 1
        local = [f"{phase}/{term}" for (phase, term), total in report.sums.items() if not bool(torch.isfinite(total))]
        self.nonfinite += len(local)
        ranks = self.group.texts(",".join(local))
        where = "; ".join(f"rank {rank}: {names}" for rank, names in enumerate(ranks) if names)
        text = f"non-finite gradient of the {' and '.join(report.skipped)} at {nimg} images, step skipped " + (
            f"(non-finite terms: {where})" if where else "(all loss terms finite: the backward pass overflowed)"
        )
        if self.group.is_main:
            print(text, file=sys.stderr)
        if self.in_a_row >= PATIENCE:
            raise UserError(
                f"{text}; {PATIENCE} iterations in a row were skipped",
                "lower the learning rate, raise objective.beta_neg or objective.beta_kl, set optim.clip_norm, or try "
                "precision.dtype fp32; the last checkpoint is whole, the same command resumes from it",
            )

    def counts(self) -> dict[str, float]:
        """The tags `guard/...` since the start of this process."""
        return {"guard/nonfinite": float(self.nonfinite), "guard/skipped": float(self.skipped)}

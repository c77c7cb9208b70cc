"""Numbers that are no numbers: counted, reported by name and rank, never stepped on and never hidden.

An iteration has already skipped what was not finite (engine/iteration.py). The guard counts, tells, and decides when a
run goes back to its last good checkpoint, or ends.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from sivae_dist.distributed.group import Group
from sivae_dist.engine.finite import Skip
from sivae_dist.engine.logs import log
from sivae_dist.errors import UserError

ADVICE = (
    "lower the learning rate (optim.encoder.lr and optim.decoder.lr, of a growing model progressive.lr), set "
    "optim.clip_norm, raise objective.beta_kl, or use precision.dtype fp32; if the "
    "message names the data, run `sivae-dist data verify` on them. Checkpoints are whole: the same command with such a "
    "change goes on from the last one, --resume PATH from an earlier one"
)

GIVEN_UP = "and the run has been rolled back"  # in the message that ends it


@dataclass(frozen=True)
class GuardConfig:
    """What happens when losses or gradients are not finite (such a step is never taken)."""

    patience: int = 10
    """After this many iterations in a row with a skipped step, the run goes back to its last good checkpoint (or to its
    beginning), and on from there with other data order and noise."""
    max_rollbacks: int = 3
    """So often it goes back; the next time it ends with an error."""

    def __post_init__(self) -> None:
        if self.patience < 1 or self.max_rollbacks < 0:
            raise UserError(
                f"guard: patience {self.patience}, max_rollbacks {self.max_rollbacks} are not all in range",
                "patience must be at least 1, max_rollbacks at least 0",
            )


class Guard:
    """Counts over the whole run, restarts and rollbacks included. The same on all ranks."""

    def __init__(self, config: GuardConfig, group: Group) -> None:
        self.config, self.group = config, group
        self.nonfinite = self.skipped = self.overflows = self.rollbacks = self.in_a_row = 0

    @property
    def calm(self) -> bool:
        """Whether the last iteration was whole: only then is the state worth going back to."""
        return self.in_a_row == 0

    def passed(self, skip: Skip | None, nimg: int) -> bool:
        """Counts and reports an iteration that ended at `nimg`. False when the run should go back."""
        if skip is None:
            self.in_a_row = 0
        elif skip.overflow:
            self.overflows += 1
        else:
            self.nonfinite += skip.count
            self.skipped += 1
            self.in_a_row += 1
            self._say(f"not finite at {nimg} images, phase {skip.phase} skipped on all ranks ({skip.text()})")
            return self.in_a_row < self.config.patience
        return True

    def roll_back(self, nimg: int, to: str) -> None:
        """Counts and reports a rollback at `nimg` to the point named `to`. Raises UserError when there were enough."""
        bad = f"{self.in_a_row} iterations in a row were not finite, the last at {nimg} images"
        if self.rollbacks >= self.config.max_rollbacks:
            raise UserError(f"{bad}, {GIVEN_UP} {self.rollbacks} times already", ADVICE)
        self.rollbacks += 1
        self.in_a_row = 0
        self._say(f"{bad}: back to {to}, with other data order and noise (rollback {self.rollbacks})")

    def counts(self) -> dict[str, float]:
        """The tags `guard/...` that are counts."""
        return {
            f"guard/{name}": float(getattr(self, name)) for name in ("nonfinite", "skipped", "overflows", "rollbacks")
        }

    def state(self) -> dict[str, int]:
        """For a checkpoint."""
        return {name: getattr(self, name) for name in ("nonfinite", "skipped", "overflows", "rollbacks", "in_a_row")}

    def load(self, state: dict[str, int]) -> None:
        """Takes up a checkpoint's state (on resume; a rollback keeps the live counts)."""
        for name in self.state():
            setattr(self, name, int(state.get(name, 0)))

    def _say(self, text: str) -> None:
        log.warning(text)
        if self.group.is_main:
            print(text, file=sys.stderr, flush=True)

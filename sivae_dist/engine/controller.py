"""Keeps fakes recognisable: when the KL gap is too small, slowly moves the objective's strength to where it is not.

The encoder tells real data from fakes by their KL, so kl_gap = kl_fake - kl_real is its lead over the decoder. When it
is gone (users see kl_real > kl_fake), fakes are no longer pushed away and the introspective game is over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sivae_dist.engine.iteration import IterationReport
from sivae_dist.engine.meters import Meters
from sivae_dist.engine.schedule import due
from sivae_dist.errors import UserError
from sivae_dist.objectives import Objective


@dataclass(frozen=True)
class ControllerConfig:
    """Adjusts objective.beta_neg (soft_introvae) or objective.margin (introvae) during training."""

    enabled: bool = False
    """Off: the strength stays what the objective's section says, as published."""
    kl_gap: float = 5.0
    """Floor in nats: while kl_fake - kl_real is below it, the strength moves towards the value with which fakes settle
    this far above real data."""
    rate: float = 1.1
    """Largest factor by which the strength changes in 1000 images."""
    every_kimg: float = 1.0
    """The gap is averaged over this many thousand images before the strength moves."""
    min: float | None = None
    """Lower bound of the strength; None for a hundredth of the configured one."""
    max: float | None = None
    """Upper bound of the strength; None for a hundred times the configured one."""

    def __post_init__(self) -> None:
        if self.rate <= 1 or self.every_kimg <= 0:
            raise UserError(
                f"controller: rate {self.rate}, every_kimg {self.every_kimg} are not all in range",
                "rate must be above 1, every_kimg positive",
            )
        if not 0 < (self.min or 1e-300) <= (self.max or float("inf")):
            raise UserError(
                f"controller: min {self.min} and max {self.max} are no bounds", "they must be positive, min below max"
            )


class Controller:
    """Moves `objective.strength` after iterations. It sees only sums over all ranks, so all ranks move alike.

    meters: its own, since it averages over another interval than the reports do.
    """

    def __init__(self, config: ControllerConfig, objective: Objective, meters: Meters) -> None:
        self.config, self.meters = config, meters
        self.strength = objective.strength if config.enabled else None
        if config.enabled and self.strength is None:
            raise UserError(
                f"controller.enabled is True, but the objective {type(objective).__name__} has nothing to adjust",
                "use it with objective.name soft_introvae or introvae",
            )
        if self.strength is not None:
            self.start = self.strength.value
            if self.start <= 0:
                raise UserError(
                    f"controller.enabled is True, but objective.{self.strength.name} is {self.start}: a factor cannot "
                    "move it",
                    "start from a small positive value",
                )
            self.low = config.min if config.min is not None else self.start / 100
            self.high = config.max if config.max is not None else self.start * 100

    def after(self, report: IterationReport, nimg: int, batch: int) -> None:
        """After the iteration of `batch` images that ended at `nimg`. Collective when due."""
        if self.strength is None:
            return
        self.meters.add(report, batch)
        if not due(nimg, batch, self.config.every_kimg):
            return
        means = self.meters.means()
        gap = means.get("kl/gap")
        if gap is None or gap >= self.config.kl_gap:  # without a gap: a warm-up, or nothing was finite
            return
        level = means["kl/real"] + self.config.kl_gap
        wanted = self.strength.settles(level, means.get("encoder/rec_fake", 0.0))
        step = self.config.rate**self.config.every_kimg
        value = min(max(wanted, self.strength.value / step), self.strength.value * step)
        self.strength.value = min(max(value, self.low), self.high)

    def values(self) -> dict[str, float]:
        """The tag `controller/beta_neg` or `controller/margin`."""
        return {f"controller/{self.strength.name}": self.strength.value} if self.strength is not None else {}

    def state(self) -> dict[str, Any]:
        """For a checkpoint (after the meters have settled)."""
        if self.strength is None:
            return {}
        return {"name": self.strength.name, "value": self.strength.value, "sums": self.meters.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Takes up a checkpoint's state. One without (or of another objective) is the beginning."""
        if self.strength is None:
            return
        mine = state.get("name") == self.strength.name
        self.strength.value = float(state["value"]) if mine else self.start
        self.meters.load(state["sums"] if mine else {})

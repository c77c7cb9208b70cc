"""The factor that keeps small gradients above the smallest half-precision number, one a player."""

from __future__ import annotations

from collections.abc import Iterable

from sivae_dist.engine.finite import Skip
from sivae_dist.engine.precision import PrecisionConfig

SMALLEST, LARGEST = 1.0, 2.0**32


class LossScales:
    """Dynamic scales: halved when a gradient overflows, doubled after `steps` steps without. Powers of two, so exact.

    With enabled=False (float32 and bfloat16, whose exponents are as wide) every scale is 1 and stays it. A phase that
    trains both players is scaled by the smaller of their scales. An overflow at scale 1 is no overflow of the scale.
    """

    def __init__(self, *, enabled: bool = False, start: float = 65536.0, steps: int = 2000) -> None:
        self.enabled, self.start, self.steps = enabled, start, steps
        self.scale: dict[str, float] = {}
        self.since: dict[str, int] = {}  # steps since the last change

    @classmethod
    def of_config(cls, config: PrecisionConfig) -> LossScales:
        """As the section `precision` asks for."""
        return cls(enabled=config.resolved() == "fp16", start=config.loss_scale, steps=config.loss_scale_steps)

    def of(self, players: Iterable[str]) -> float:
        """What the loss of a phase that trains these players is multiplied by."""
        return min(self.scale.setdefault(player, self.start) for player in players) if self.enabled else 1.0

    def update(self, players: Iterable[str], skip: Skip | None) -> None:
        """After a phase. Marks `skip` as an overflow if a smaller scale may cure it."""
        if not self.enabled:
            return
        if skip is None:
            for player in players:
                self.since[player] = self.since.get(player, 0) + 1
                if self.since[player] >= self.steps:
                    self.scale[player], self.since[player] = min(2 * self.scale[player], LARGEST), 0
            return
        used = self.of(players)
        skip.overflow = not skip.forward and used > SMALLEST
        if skip.overflow:
            for player in skip.players:
                self.scale[player], self.since[player] = used / 2, 0

    def values(self) -> dict[str, float]:
        """The tags `guard/loss_scale_PLAYER`."""
        return {f"guard/loss_scale_{player}": scale for player, scale in self.scale.items()}

    def state(self) -> dict[str, dict[str, float]]:
        """For a checkpoint."""
        return {"scale": dict(self.scale), "since": {player: float(steps) for player, steps in self.since.items()}}

    def load(self, state: dict[str, dict[str, float]]) -> None:
        """Takes up a checkpoint's state; an empty one is the beginning."""
        self.scale = {player: float(value) for player, value in state.get("scale", {}).items()}
        self.since = {player: int(value) for player, value in state.get("since", {}).items()}

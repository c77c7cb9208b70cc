"""Stopping well: a signal asks, all ranks agree, a checkpoint is written, the same command goes on later."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

from sivae_dist.distributed.group import Group

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Within the context, SIGINT, SIGTERM and SIGUSR1 ask for a stop after the current iteration.

    A second SIGINT interrupts at once, as usual. minutes: ask by itself after so long; 0 never does.
    """

    def __init__(self, group: Group, minutes: float = 0.0) -> None:
        self.group = group
        self.asked = False
        self._deadline = time.monotonic() + 60 * minutes if minutes > 0 else None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop: the same answer on all ranks. Collective."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.asked = True
        return self.group.any(self.asked)

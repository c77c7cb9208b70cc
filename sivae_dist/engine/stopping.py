"""Stopping well: a signal asks, or a launcher that has gone; all ranks agree, a checkpoint is written, the same command
goes on later."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

from sivae_dist.distributed import launcher
from sivae_dist.engine.logs import log

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Within the context, SIGINT, SIGTERM and SIGUSR1 ask for a stop after the current iteration.

    A second SIGINT interrupts at once, as usual. The end of the launcher asks, too: signals may reach only that, and
    kill it. minutes: ask by itself after so long; 0 never does.
    """

    def __init__(self, minutes: float = 0.0) -> None:
        self.asked = False
        launcher.remember()
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

    def asked_by_now(self) -> bool:
        """Whether this rank was asked to stop. Ranks agree on it once an iteration, in the trainer."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.asked = True
        if not self.asked and launcher.gone():
            log.warning("the launcher has ended: this run saves and ends, too")
            self.asked = True
        return self.asked

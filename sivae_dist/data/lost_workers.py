"""A worker of torch's DataLoader that dies is an error of the batch that is waited for, not of whatever runs then.

torch answers SIGCHLD by raising in the main thread, wherever that is: in the middle of a step, or of a checkpoint. It
has to raise where a batch is waited for, which nothing else would end for `data.timeout_s`. So its handler is kept and
asked within `waiting` alone; a death at another time is told by the next wait.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]


class _State:
    theirs: Handler | None = None
    waits = 0
    missed = False


def _handler(number: int, frame: FrameType | None) -> None:
    if _State.theirs is None or not _State.waits:
        _State.missed = True
        return
    _State.theirs(number, frame)


def hear_later() -> None:
    """To be called when torch has started workers, and with them its handler. Handlers belong to the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return
    present = signal.getsignal(signal.SIGCHLD)
    if callable(present) and present is not _handler:
        _State.theirs = present
        signal.signal(signal.SIGCHLD, _handler)


@contextmanager
def waiting() -> Iterator[None]:
    """Within, the death of a worker raises what torch raises (RuntimeError), also if it came before."""
    _State.waits += 1
    try:
        if _State.missed and _State.theirs is not None:
            _State.missed = False
            _State.theirs(signal.SIGCHLD, None)
        yield
    finally:
        _State.waits -= 1

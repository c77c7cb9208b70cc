"""Progress bars: tqdm's, with a lock of this process alone.

tqdm's own lock is one for all processes that are forked later, and stays locked if one of them is killed while it has
it: the others' bars then wait for ever.
"""

from __future__ import annotations

import os
import threading

from tqdm import tqdm


class Bar(tqdm):  # type: ignore[type-arg]
    """A bar on stderr, with the time left; see tqdm for its options."""


def _own_lock() -> None:
    Bar.set_lock(threading.RLock())


_own_lock()
os.register_at_fork(after_in_child=_own_lock)  # a thread that is not there may have the other one

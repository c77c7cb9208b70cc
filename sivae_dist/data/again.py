"""Shards of which nothing could be read: when they are asked for again.

Asking takes long where servers are far, so a shard that failed is left alone for a while: FIRST_S seconds, then twice
as long after every failure, at most MOST_S. A shard that comes back is used from then on. Until it does, what is served
in its place depends on the position alone (`replace`), however often it was asked for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sivae_dist.data.faults import DataError

FIRST_S, MOST_S = 30.0, 1800.0

_clock = time.monotonic


@dataclass
class _Bad:
    error: DataError
    pause_s: float
    until: float
    trying: bool = False


class BadShards:
    """Shards by number that failed, each with the error to raise for them."""

    def __init__(self) -> None:
        self._bad: dict[int, _Bad] = {}

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._bad)

    def __contains__(self, shard: int) -> bool:
        """Whether a shard has failed and nothing of it was read since."""
        return shard in self._bad

    def error(self, shard: int) -> DataError | None:
        """What to raise instead of asking; None for a shard that never failed or may be asked for now."""
        bad = self._bad.get(shard)
        if bad is None or bad.trying or _clock() >= bad.until:
            return None
        return bad.error.with_traceback(None)  # raised again and again, it would collect the stacks of all of them

    def begins(self, shard: int) -> bool:
        """Whether the shard is asked for the first time since it failed: what is held of it is outdated."""
        bad = self._bad.get(shard)
        if bad is None or bad.trying:
            return False
        bad.trying = True
        return True

    def failed(self, shard: int, error: DataError) -> None:
        """Nothing can be read of a shard, as far as is known for now."""
        old = self._bad.get(shard)
        pause = FIRST_S if old is None else min(2 * old.pause_s, MOST_S)
        self._bad[shard] = _Bad(error, pause, _clock() + pause)

    def works(self, shard: int) -> bool:
        """Something was read of a shard. Returns whether it had failed before."""
        return self._bad.pop(shard, None) is not None

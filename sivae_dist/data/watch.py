"""What each worker is reading right now, for the message when nothing comes."""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_SLOT = struct.Struct("<dqqq")  # since when (time.monotonic, the same clock in all processes; 0: nothing), shard, ...
INDEX = -1  # as an offset: the index of the shard


@dataclass(frozen=True)
class Reading:
    """A read that goes on. offset: in the tar, or INDEX."""

    worker: int
    shard: int
    offset: int
    size: int
    seconds: float

    def text(self, names: Sequence[str]) -> str:
        """In words. names: of the shards."""
        name = names[self.shard]
        what = f"{name}.index" if self.offset == INDEX else f"{self.size} bytes at {self.offset} of {name}.tar"
        return f"worker {self.worker} has been reading {what} for {self.seconds:.0f} s"


class Watch:
    """One slot a worker, in memory shared with the processes that are forked from here.

    No locks: a worker may be killed at any time, and a number torn between two writes only spoils a message.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._memory = mmap.mmap(-1, max(1, workers) * _SLOT.size)

    def teller(self, worker: int) -> Callable[[int, int, int], None]:
        """In a worker: what is to be told of each read (shard, offset, size), and of its end by a shard below 0."""
        memory, at, now, write = self._memory, worker * _SLOT.size, time.monotonic, _SLOT.pack_into

        def tell(shard: int, offset: int, size: int) -> None:
            write(memory, at, now() if shard >= 0 else 0.0, shard, offset, size)

        return tell

    def longest(self) -> Reading | None:
        """The read that has gone on for longest, None when there is none."""
        now = time.monotonic()
        found = [(worker, *_SLOT.unpack_from(self._memory, worker * _SLOT.size)) for worker in range(self.workers)]
        readings = [Reading(w, shard, offset, size, now - since) for w, since, shard, offset, size in found if since]
        return max(readings, key=lambda r: r.seconds, default=None)

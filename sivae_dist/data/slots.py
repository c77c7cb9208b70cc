"""Memory for batches that workers and the training process share and use again and again.

A picture of 1024 px covers 768 pages of memory. To have the kernel find and clear them anew for every picture, in the
worker and once more in the training process, costs more than to decode the picture. So each worker has a few slots of
one batch, which come into being before the workers do; a slot is busy from when a worker takes it until the last tensor
on it is gone in the training process. A worker that finds all its slots busy, or a batch that is too large, goes the
plain way: a tensor of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import weakref
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_PAGE = mmap.PAGESIZE
_numbers = itertools.count()
_pools: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Place:
    """Where a batch lies: the slot of a pool. Travels from a worker to the training process."""

    pool: int
    slot: int


class Slots:
    """`each` slots of `size` bytes for each of `workers` processes that are forked after this.

    One byte a slot tells whether it is busy. Only its worker sets it and only the training process clears it. shared:
    False where the training process is its own worker.
    """

    def __init__(self, workers: int, each: int, size: int, *, shared: bool = True) -> None:
        self.each, self.size = each, size
        self._stride = -(-size // _PAGE) * _PAGE  # pages are the kernel's to give; slots do not share any
        # Anonymous memory, not a file in /dev/shm, whose size containers limit; pages that are never used cost nothing.
        kind = mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
        self._memory = mmap.mmap(-1, max(1, workers * each) * self._stride, flags=kind)
        with contextlib.suppress(AttributeError, OSError):  # large pages, where this kernel gives them on request
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._busy = np.frombuffer(mmap.mmap(-1, max(1, workers * each)), dtype=np.uint8)
        self.number = next(_numbers)
        _pools[self.number] = self

    def take(self, worker: int, size: int) -> Place | None:
        """In a worker: a free slot for `size` bytes, or None. The first ones are preferred: their pages are there."""
        mine = self._busy[worker * self.each : (worker + 1) * self.each]
        free = np.flatnonzero(mine == 0)
        if size > self.size or not len(free):
            return None
        mine[free[0]] = 1
        return Place(self.number, worker * self.each + int(free[0]))

    def memory(self, place: Place, size: int) -> Bytes:
        """The first `size` bytes of a slot."""
        return np.frombuffer(self._memory, dtype=np.uint8, count=size, offset=place.slot * self._stride)

    def lease(self, place: Place, size: int) -> Bytes:
        """In the training process: as `memory`; the slot is free again when the array and all views of it are gone."""
        array = self.memory(place, size)
        # The mapping may outlive the pool: the array holds the one, the finaliser the other.
        weakref.finalize(array, _clear, self._busy, place.slot).atexit = False
        return array

    def give(self, place: Place) -> None:
        """In the worker that took it: free again, as nothing was sent."""
        self._busy[place.slot] = 0

    def busy(self) -> int:
        """Slots in use."""
        return int(self._busy.sum())


def _clear(busy: Bytes, slot: int) -> None:
    busy[slot] = 0


def pool_of(place: Place) -> Slots:
    """In the training process: the pool that a batch came from."""
    return _pools[place.pool]

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
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_FREE = b"\0"
_PAGE = mmap.PAGESIZE
_LARGE_PAGE = 1 << 21
# libjpeg-turbo writes rows that begin at a multiple of 32 bytes past the caches (vmovntdq), which takes 4 % longer.
_ASIDE = 16
_numbers = itertools.count()
_pools: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()


class Place(NamedTuple):
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
        # Pages are the kernel's to give; slots do not share any. Only whole large pages can be had as such.
        page = _LARGE_PAGE if size >= _LARGE_PAGE else _PAGE
        self._stride = -(-(_ASIDE + size) // page) * page
        # Anonymous memory, not a file in /dev/shm, whose size containers limit; pages that are never used cost nothing.
        kind = mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
        self._memory = mmap.mmap(-1, max(1, workers * each) * self._stride, flags=kind)
        with contextlib.suppress(AttributeError, OSError):  # large pages, where this kernel gives them on request
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._begin: int = np.frombuffer(self._memory, dtype=np.uint8).__array_interface__["data"][0]
        self._busy = mmap.mmap(-1, max(1, workers * each))
        self.number = next(_numbers)
        _pools[self.number] = self

    def take(self, worker: int, size: int) -> Place | None:
        """In a worker: a free slot for `size` bytes, or None. The first ones are preferred: their pages are there."""
        slot = self._busy.find(_FREE, worker * self.each, (worker + 1) * self.each)
        if size > self.size or slot < 0:
            return None
        self._busy[slot] = 1
        return Place(self.number, slot)

    def memory(self, place: Place, shape: int | tuple[int, ...]) -> Bytes:
        """The first bytes of a slot."""
        return np.ndarray(shape, np.uint8, self._memory, place.slot * self._stride + _ASIDE)

    def lease(self, slot: int, shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> Bytes:
        """In the training process: as `memory`; the slot is free again when the array and all views of it are gone."""
        lease = _Lease(shape, np.uint8, self._memory, slot * self._stride + _ASIDE, strides)
        lease.slots, lease.slot = self, slot
        return lease

    def address(self, slot: int) -> int:
        """Where a slot begins in memory."""
        return self._begin + slot * self._stride + _ASIDE

    def give(self, place: Place) -> None:
        """In the worker that took it: free again, as nothing was sent."""
        self.clear(place.slot)

    def clear(self, slot: int) -> None:
        """Free again."""
        self._busy[slot] = 0

    def busy(self) -> int:
        """Slots in use."""
        return len(self._busy) - self._busy[:].count(_FREE)


class _Lease(np.ndarray[tuple[int, ...], np.dtype[np.uint8]]):
    """An array on a slot. Its views keep it alive, as what it lies on is no array: numpy's views refer to the last."""

    slots: Slots | None = None  # views have none
    slot: int

    def __del__(self) -> None:
        if self.slots is not None:
            self.slots.clear(self.slot)


def pool_of(place: Place) -> Slots:
    """In the training process: the pool that a batch came from."""
    return _pools[place.pool]

"""What is known of batches before a picture is read: positions, samples, random changes. Made for many at a time.

Between two batches the processor's caches hold pictures: a few short calls for each batch then take as long as a tenth
of decoding it. So these are computed for about a thousand positions together and handed out batch by batch.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sivae_dist.data.augment import Augmentation, Drawn
from sivae_dist.data.manifest import ShardInfo
from sivae_dist.data.plan import Plan

Int64 = npt.NDArray[np.int64]

_BATCHES_AT_MOST = 64  # in a chunk: ranks may own nothing of a batch


@dataclass(slots=True)  # and not frozen, which takes longer to make
class Reads:
    """What a process reads for one batch, in its order of reading: shard by shard and forwards, as disks like it.

    One entry a sample. place: the row of the batch; position: in the stream, or the number of a held-out sample.
    """

    place: list[int]
    position: list[int]
    shard: list[int]
    number: list[int]

    def __len__(self) -> int:
        return len(self.place)

    @classmethod
    def unpacked(cls, message: bytes) -> Reads:
        """From the columns one after another, int64."""
        return cls(*np.frombuffer(message, dtype=np.int64).reshape(4, -1).tolist())


@dataclass(frozen=True)
class Part:
    """What the training process keeps of a batch until its pictures come. position: (B,) int64; reads: packed."""

    position: Tensor
    augment: Drawn | None
    reads: bytes


class Parts(Iterable[bytes]):
    """One batch after another: its `Reads`, packed, for whoever decodes; its `Part` waits in `waiting`, in order.

    runs:    chunks of positions, each with the sizes of the batches that lie in it
    locate:  positions (B,) -> shard (B,) and number in it (B,)
    pinned:  keep tensors in page-locked memory
    """

    def __init__(
        self,
        runs: Iterable[tuple[Int64, list[int]]],
        locate: Callable[[Int64], tuple[Int64, Int64]],
        augmentation: Augmentation | None,
        *,
        pinned: bool = False,
    ) -> None:
        self.waiting: deque[Part] = deque()
        self._runs, self._locate, self._augmentation, self._pinned = runs, locate, augmentation, pinned

    def __iter__(self) -> Iterator[bytes]:
        for positions, sizes in self._runs:
            shard, number = self._locate(positions)
            batch = np.repeat(np.arange(len(sizes)), sizes)
            order = np.lexsort((number, shard, batch))
            ends = np.cumsum(sizes)
            place = order - (ends - sizes)[batch]
            columns = np.stack([place, positions[order], shard[order], number[order]])
            drawn = None if self._augmentation is None else self._augmentation.draw(positions)
            position = torch.from_numpy(positions)
            if self._pinned:
                position, drawn = position.pin_memory(), None if drawn is None else drawn.pin_memory()
            made = []
            for begin, end in itertools.pairwise([0, *ends.tolist()]):
                here = slice(begin, end)
                reads = columns[:, here].tobytes()
                made.append(Part(position[here], None if drawn is None else drawn.part(here), reads))
            for part in made:
                self.waiting.append(part)
                yield part.reads


def planned(
    plan: Plan, start: int, size: int | Callable[[int], int], rank: int, ranks: int
) -> Iterator[tuple[Int64, list[int]]]:
    """For `Parts`: this rank's positions of one global batch after another, from `start`, endlessly."""
    while True:
        own: list[Int64] = []
        while len(own) < _BATCHES_AT_MOST and (not own or sum(map(len, own)) + len(own[-1]) <= plan.at_once):
            count = size if isinstance(size, int) else size(start)
            own.append(plan.owned(start, count, rank, ranks))
            start += count
        yield np.concatenate(own), [len(positions) for positions in own]


def listed(numbers: Sequence[int], batch: int) -> list[tuple[Int64, list[int]]]:
    """For `Parts`: samples by number, in batches of `batch`, the last of which may be smaller."""
    parts = [np.asarray(numbers[i : i + batch], dtype=np.int64) for i in range(0, len(numbers), batch)]
    return [(part, [len(part)]) for part in parts]


def in_shard_order(shards: Sequence[ShardInfo]) -> Callable[[Int64], tuple[Int64, Int64]]:
    """For `Parts`: finds samples by their numbers in shard order."""
    counts = np.asarray([shard.count for shard in shards], dtype=np.int64)
    ends = np.cumsum(counts)

    def locate(numbers: Int64) -> tuple[Int64, Int64]:
        shard = np.searchsorted(ends, numbers, side="right")
        return shard, numbers - (ends - counts)[shard]

    return locate

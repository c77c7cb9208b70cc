"""Samples that cannot be used: which other one takes the slot, so that every run over these data takes the same.

The replacement is a function of position, seed and salt, so ranks, workers and restarts do not change it. The
position stays that of the slot: noise and augmentation are drawn as they would have been.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sivae_dist.counters import hash64, key
from sivae_dist.data.faults import DataError, Fault, Report
from sivae_dist.data.shard_read import ShardReader

OnError = Literal["raise", "skip", "quarantine"]
ATTEMPTS = 16  # of finding a good sample for a slot; more bad ones in a row than that are no accident
_REMEDY = "`sivae-dist data verify` lists all damage"


@dataclass(frozen=True)
class Tolerance:
    """What to do about a sample that cannot be used. seed, salt: those of the plan."""

    on_error: OnError = "raise"
    seed: int = 0
    salt: int = 0

    def candidate(self, position: int, attempt: int, samples: int) -> int:
        """The number, among all samples in shard order, of the attempt-th replacement for a position."""
        draw = hash64(key(self.seed, "replacement", self.salt, attempt), np.asarray([position], dtype=np.uint64))
        return int(draw[0] % np.uint64(samples))


class Replacing:
    """Reads samples of a reader; what is wrong with them becomes an error, or a fault and another sample.

    read: reads (shard, number) and returns its label. Every fault goes into the report that is given.
    """

    def __init__(self, reader: ShardReader, tolerance: Tolerance, read: Callable[[int, int], int]) -> None:
        self.reader, self.tolerance, self._read = reader, tolerance, read

    @functools.cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        return np.cumsum([shard.count for shard in self.reader.shards])

    def read(self, position: int, shard: int, number: int, report: Report) -> int:
        """The sample, or the one that takes its place. Raises DataError where that is not wanted or not possible."""
        label = self.read_or_leave_out(position, shard, number, report)
        if label is not None:
            return label
        first = report.faults[-1]
        for attempt in range(ATTEMPTS):
            place = self.tolerance.candidate(position, attempt, int(self._ends[-1]))
            shard = int(np.searchsorted(self._ends, place, side="right"))
            try:
                return self._read(shard, place - int(self._ends[shard]) + self.reader.shards[shard].count)
            except DataError:
                continue
        what = f"{first.what}; and {ATTEMPTS} samples that could take its place are bad, too"
        raise DataError(first.reason, what, _REMEDY)

    def read_or_leave_out(self, position: int, shard: int, number: int, report: Report) -> int | None:
        """The sample, or None. Raises DataError where that is not wanted."""
        try:
            return self._read(shard, number)
        except DataError as error:
            if self.tolerance.on_error == "raise":
                raise
            report.faults.append(self._fault(position, shard, number, error))
            return None

    def _fault(self, position: int, shard: int, number: int, error: DataError) -> Fault:
        """A record of what was wrong; with the bytes where they are to be kept."""
        keep = self.tolerance.on_error == "quarantine"
        return Fault(
            position,
            self.reader.shards[shard].name,
            number,
            self.reader.known_key(shard, number),
            error.reason,
            error.what,
            keep,
            self.reader.manifest.image_format,
            error.data if keep else b"",
        )

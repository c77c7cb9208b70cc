"""What can be wrong with data that are read, told apart by a word, so that a run can count it and live with some of it.

A `DataError` is about the data themselves (a damaged picture, a vanished shard): reading again gives the same, so that
a run may go on without that sample (`data.on_error`) and be repeated exactly. A `StorageError` is about the way to
them (a server that does not answer): it always ends the run, since what is trained on must not depend on the weather.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from sivae_dist.errors import UserError

# missing: a file is not there. truncated: it has another size than was packed. crc: its bytes are others.
# index: its list of samples cannot be used. decode: the bytes are as packed, but no picture that fits.
REASONS = ("missing", "truncated", "crc", "index", "decode")


# Events on the way to the data, counted: attempts repeated, ranges read again since they were damaged on the way, ...
EVENTS = (
    "retries",
    "reread",
    "fetched_bytes",
    "cache_hits",
    "cache_misses",
    "cache_refused",
    "cache_damaged",
    "cache_evicted",
)


class DataError(UserError):
    """Something in the data is not as it was packed. reason: one of REASONS; data: the bytes concerned, if there."""

    def __init__(self, reason: str, what: str, fix: str = "", data: bytes = b"") -> None:
        if reason not in REASONS:
            raise ValueError(f"reason {reason!r}")
        self.reason, self.data = reason, data
        super().__init__(what, fix)

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str, str, bytes]]:
        return type(self), (self.reason, self.what, self.fix, self.data)


class StorageError(UserError):
    """Data that may be whole cannot be had now: refused, unreachable, too slow."""


class RefusedError(StorageError):
    """The server does not let this process read a file; some say so of files that are not there."""


@dataclass(frozen=True)
class Fault:
    """A slot whose sample could not be used. keep: whether it is to be put aside, with data, its bytes, if there."""

    position: int
    shard: str
    number: int
    key: str
    reason: str
    what: str
    keep: bool = False
    image_format: str = ""
    data: bytes = field(default=b"", repr=False)


@dataclass
class Report:
    """What reading one batch met, on its way from a worker to the training loop.

    faults: slots that got another sample. counts: events by name, see docs/data.md. notes: what a user should be told
    once.
    """

    faults: list[Fault] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.faults or self.counts or self.notes)

"""One attempt at getting bytes from elsewhere. Trying again, caching and checking is `stores/remote.py`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


class TransientError(Exception):
    """An attempt that may succeed when made again. why: without secrets. after_s: how long the server asks to wait."""

    def __init__(self, why: str, after_s: float | None = None) -> None:
        self.why, self.after_s = why, after_s
        super().__init__(why)


@dataclass(frozen=True)
class Patience:
    """Until when, on the clock of time.monotonic, and how long a single wait on the way may be."""

    until: float
    connect_s: float
    read_s: float

    def left(self) -> float:
        """Seconds, at least a little."""
        return max(0.05, self.until - time.monotonic())

    def spend(self) -> None:
        """Raises TransientError when the time is over: a server may send one byte now and then for ever."""
        if time.monotonic() > self.until:
            raise TransientError("too slow")


class Body(Protocol):
    """An answer.

    ranged: whether it holds the range that was asked for; else it is the whole file from its beginning.
    total: bytes of the file, None when unknown. settled: an answer shorter than asked for is what there is, not a cut.
    """

    ranged: bool
    total: int | None
    settled: bool

    def chunks(self) -> Iterator[bytes]:
        """The bytes as they come. Raises TransientError when they end too early."""
        ...

    def close(self) -> None:
        """Gives the connection back, or ends it when the bytes were not read to the end."""
        ...


class Transport(Protocol):
    """How to reach one folder elsewhere. url: for messages, without secrets."""

    url: str
    manifest_name: str

    def open(self, name: str, offset: int, length: int | None, patience: Patience, *, most: int | None = None) -> Body:
        """Asks for a range of a file (length None: all of it).

        most: more bytes than these are of no use. Who gives them as they come need not heed it, since the reader stops
        then; who must hold the whole answer asks for no more.

        Raises TransientError, DataError (there is no such file, or it is shorter) or StorageError (refused).
        """
        ...

    def size(self, name: str, patience: Patience) -> int | None:
        """Bytes of a file, None when there is no way to know. Raises as `open`."""
        ...

    def close(self) -> None:
        """Ends connections."""
        ...

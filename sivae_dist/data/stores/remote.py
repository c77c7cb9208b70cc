"""A shard folder elsewhere: attempts that are repeated, blocks that are kept, sizes that are held to the manifest."""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from sivae_dist.data.faults import DataError, StorageError
from sivae_dist.data.manifest import MAX_INDEX_BYTES
from sivae_dist.data.stores.base import Access, Events, Expected
from sivae_dist.data.stores.cache import BlockCache
from sivae_dist.data.stores.transport import Body, Patience, TransientError, Transport

T = TypeVar("T")

_AT_ONCE = 8  # blocks on their way to one process
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_REMEDY = "upload the shard again, or pack the data set again; `sivae-dist data verify` lists all damage"


class _RangeIgnored(Exception):  # noqa: N818 (a way of going on, not an error)
    """The server sends whole files whatever is asked for."""


class RemoteStore:
    """A `Store` over a transport. cache: None reads every range from there, one request each."""

    def __init__(self, transport: Transport, access: Access) -> None:
        self.transport, self.access = transport, access
        self.url, self.manifest_name = transport.url, transport.manifest_name
        self.events = Events()
        limit = int(access.cache_gb * 1e9)
        self.cache = BlockCache(access.cache_folder(), limit, self.events) if limit else None
        self._expected: dict[str, Expected] = {}
        self._whole_files_only = False

    def expect(self, files: Mapping[str, Expected]) -> None:
        """Takes what the manifest says of the files: names for the cache, and sizes that need not be asked for."""
        self._expected.update(files)

    def size(self, name: str) -> int:
        """Bytes of a file: as expected (every answer is checked against that), else as the server says."""
        if (expected := self._expected.get(name)) and expected.bytes:
            return expected.bytes
        found = self._attempts(name, 0, "its size", lambda patience: self.transport.size(name, patience))
        if found is None:
            raise StorageError(f"{self.url}/{name}: the server does not tell its size", "use another server")
        return found

    def look(self, name: str) -> None:
        """Asks for the first byte of a file. Raises DataError (missing), RefusedError, or StorageError."""

        def attempt(patience: Patience) -> None:
            self.transport.open(name, 0, 1, patience).close()

        self._attempts(name, 0, "its first byte", attempt)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """A range of a file, shorter than `length` only at the file's end."""
        expected = self._expected.get(name)
        if expected is None or not expected.bytes:
            length = min(length, max(0, self.size(name) - offset))
            return self._range(name, offset, length) if length else b""
        length = min(length, expected.bytes - offset)
        if length <= 0:
            return b""
        if self.cache is None:
            return self._range(name, offset, length)
        parts, size = [], self.cache.block
        for number in range(offset // size, (offset + length - 1) // size + 1):
            begin = max(offset - number * size, 0)
            end = min(offset + length - number * size, size)
            parts.append(self._cached(self.cache, name, expected, number, begin, end - begin))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def whole(self, name: str, limit: int) -> bytes:
        """A small file, whole; kept in the cache when the manifest says what it is."""
        expected = self._expected.get(name)
        if expected is None or self.cache is None:
            return self._all(name, limit)
        key = f"{expected.sha256}-whole"
        with self.cache.lock(key, time.monotonic() + self.access.limit_s / 3):
            data = self.cache.read(key)
            if data is None:
                data = self._all(name, limit)
                self.cache.put(key, data)
        return data

    def prepare(self, wanted: Sequence[tuple[str, int, int]]) -> None:
        """Fetches the blocks of these ranges that are not there, several at a time: latency counts once, not for each.

        No more than a quarter of the cache, lest they drive each other out. Raises StorageError.
        """
        cache, jobs = self.cache, dict[str, Callable[[], bytes]]()
        if cache is None or self._whole_files_only or not cache.accepts():
            return
        for name, offset, length in wanted:
            if (expected := self._expected.get(name)) is None:
                continue
            if not length:
                jobs.setdefault(f"{expected.sha256}-whole", partial(self.whole, name, MAX_INDEX_BYTES))
            for number in range(offset // cache.block, -(-(offset + length) // cache.block) if length else 0):
                fetch = partial(self._cached, cache, name, expected, number, 0, 0)
                jobs.setdefault(self._key(expected, number), fetch)
        missing = [job for key, job in jobs.items() if not cache.has(key)][: max(1, cache.limit // cache.block // 4)]
        if len(missing) < 2:
            return
        _together(missing)

    def forget(self, name: str, offset: int, length: int) -> bool:
        """Drops the blocks of a range that turned out damaged: reading it again asks the server."""
        expected = self._expected.get(name)
        if expected is not None and self.cache is not None:
            self.cache.drop(f"{expected.sha256}-whole")
            for number in range(offset // self.cache.block, (offset + length) // self.cache.block + 1):
                self.cache.drop(self._key(expected, number))
        self.events.count("reread")
        return True

    def renew(self, name: str) -> None:
        """Nothing is held of a file but blocks of the very one that is expected."""

    def close(self) -> None:
        """Ends connections and closes files."""
        self.transport.close()
        if self.cache is not None:
            self.cache.close()

    def _key(self, expected: Expected, number: int) -> str:
        size = self.cache.block if self.cache is not None else 0
        return f"{expected.sha256}-{size >> 10}k-{number}"

    def _cached(self, cache: BlockCache, name: str, expected: Expected, number: int, begin: int, length: int) -> bytes:
        """Some bytes of one block, which is fetched when it is not there. length 0: only to have it in the cache."""
        key, count = self._key(expected, number), self.events.count
        data = cache.read(key, begin, length)
        if data is not None:
            count("cache_hits")
            return data
        until = time.monotonic() + self.access.limit_s / 3
        place = number * cache.block
        if not self._whole_files_only:
            if not cache.accepts():
                if not length:  # only to be kept, and there is no room any more
                    return b""
                count("cache_refused")
                return self._range(name, place + begin, length)
            with cache.lock(key, until):
                data = cache.read(key, begin, length)  # another process may have fetched it meanwhile
                if data is not None:
                    count("cache_hits")
                    return data
                try:
                    block = self._range(name, place, min(cache.block, expected.bytes - place))
                    count("cache_misses")
                    cache.put(key, block)
                    return block[begin : begin + length]
                except _RangeIgnored:
                    self._whole_files_only = True
                    self.events.notes.append(f"{self.url}: the server ignores Range, whole shards are downloaded")
        with cache.lock(f"{expected.sha256}-all", until):
            data = cache.read(key, begin, length)
            if data is None:
                count("cache_misses")
                data = self._pour(cache, name, expected, number)[begin : begin + length]
        return data

    def _range(self, name: str, offset: int, length: int) -> bytes:
        """Exactly these bytes, from the server. Raises _RangeIgnored where a cache can help, else as `Store`."""
        got = bytearray()

        def attempt(patience: Patience) -> bytes:
            body = self.transport.open(name, offset + len(got), length - len(got), patience)
            try:
                self._check_total(name, body.total)
                if not body.ranged and (got or offset or body.total is None or body.total > length):
                    raise _RangeIgnored
                self._receive(name, body, got, length)
            finally:
                body.close()
            return bytes(got)

        try:
            return self._attempts(name, offset, f"{length} bytes", attempt, got)
        except _RangeIgnored:
            if self.cache is not None and self.cache.accepts():
                raise
            raise self._useless_server(name) from None

    def _receive(self, name: str, body: Body, got: bytearray, length: int) -> None:
        for chunk in body.chunks():
            got += chunk
            self.events.count("fetched_bytes", len(chunk))
            if len(got) > length:
                raise StorageError(f"{self.url}/{name}: more bytes come than were asked for", "check the server")
        if len(got) < length:
            if body.settled:
                raise DataError("truncated", f"{self.url}/{name} is truncated: it ends too early", _REMEDY)
            raise TransientError("the connection was cut")

    def _all(self, name: str, limit: int) -> bytes:
        def attempt(patience: Patience) -> bytes:
            body = self.transport.open(name, 0, None, patience, most=limit + 1)
            got = bytearray()
            try:
                for chunk in body.chunks():
                    got += chunk
                    if len(got) > limit:
                        what = f"{self.url}/{name} has more than {limit} bytes"
                        raise DataError("truncated", what, _REMEDY)
                self.events.count("fetched_bytes", len(got))
            finally:
                body.close()
            return bytes(got)

        return self._attempts(name, 0, "the file", attempt)

    def _pour(self, cache: BlockCache, name: str, expected: Expected, wanted: int) -> bytes:
        """Reads a whole file into the cache, block by block, and returns the block that is wanted."""
        if not cache.accepts() or 2 * expected.bytes > cache.limit:
            raise self._useless_server(name)

        def attempt(patience: Patience) -> bytes:
            body = self.transport.open(name, 0, None, patience)
            pending, number, result = bytearray(), 0, b""
            try:
                self._check_total(name, body.total)
                for chunk in body.chunks():
                    pending += chunk
                    self.events.count("fetched_bytes", len(chunk))
                    while len(pending) >= cache.block:
                        result = self._keep(cache, expected, number, pending[: cache.block], wanted) or result
                        del pending[: cache.block]
                        number += 1
            finally:
                body.close()
            self._check_total(name, number * cache.block + len(pending))
            return self._keep(cache, expected, number, pending, wanted) or result

        return self._attempts(name, 0, "the file", attempt)

    def _keep(self, cache: BlockCache, expected: Expected, number: int, block: bytearray, wanted: int) -> bytes:
        if block:
            cache.put(self._key(expected, number), bytes(block))
        return bytes(block) if number == wanted else b""

    def _useless_server(self, name: str) -> StorageError:
        what = f"{self.url}/{name}: the server ignores Range and sends whole files"
        return StorageError(what, "use a server that knows ranges, or a data.cache_gb that holds several shards")

    def _check_total(self, name: str, total: int | None) -> None:
        expected = self._expected.get(name)
        if total is None or expected is None or not expected.bytes or total == expected.bytes:
            return
        what = "truncated" if total < expected.bytes else "longer than packed"
        says = f"{total} bytes, the manifest says {expected.bytes}"
        raise DataError("truncated", f"{self.url}/{name} is {what}: {says}", _REMEDY)

    def _attempts(
        self, name: str, offset: int, what: str, attempt: Callable[[Patience], T], got: bytearray | None = None
    ) -> T:
        """The result of the first attempt that succeeds. Raises StorageError when there were enough, or too long.

        An attempt that got further (`got` has grown) begins the counting anew: only the time bounds those.
        """
        begun = time.monotonic()
        access, tries = self.access, 0
        patience = Patience(begun + access.limit_s, access.connect_timeout_s, access.read_timeout_s)
        while True:
            before = len(got or b"")
            try:
                return attempt(patience)
            except TransientError as problem:
                tries = 1 if len(got or b"") > before else tries + 1
                now, pause = time.monotonic(), _pause_s(tries, problem.after_s)
                if tries > access.retries or now + pause > patience.until:
                    asked = f", and it asks to wait {problem.after_s:.0f} s" if problem.after_s else ""
                    place = f" from byte {offset} on" if offset else ""
                    raise StorageError(
                        f"{self.url}/{name}: {problem.why}{asked}; {what}{place} given up after "
                        f"{now - begun:.1f} s and {tries} attempts in vain",
                        "check the server and the network, or raise data.retries, data.read_timeout_s, data.timeout_s",
                    ) from None
                self.events.count("retries")
                time.sleep(pause)


def _together(jobs: Sequence[Callable[[], object]]) -> None:
    """Calls them, some at a time. What ends the run is raised at once; DataError is left to who reads what is missing.

    Threads that still wait for a server by then are left to themselves, and do not keep the process from ending.
    """
    waiting: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)

    def work() -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                job()
                ended.put(None)
            except Exception as error:
                ended.put(error)

    for _ in range(min(_AT_ONCE, len(jobs))):
        threading.Thread(target=work, daemon=True, name="fetch").start()
    for _ in jobs:
        error = ended.get()
        if error is not None and not isinstance(error, DataError):
            with contextlib.suppress(queue.Empty):  # what nobody has begun is not begun any more
                while True:
                    waiting.get_nowait()
            raise error


def _pause_s(tries: int, asked_s: float | None) -> float:
    """Doubling, with jitter, so that many readers do not come back together; never less than the server asks for."""
    pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (tries - 1)) * random.uniform(0.5, 1.0)
    return max(pause, asked_s or 0.0)

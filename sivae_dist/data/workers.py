"""Answers to an endless list of requests, in order, from forked processes that work ahead.

Request k goes to worker k % count, so the order of the answers is that of the requests. Nothing is shared between
workers, nothing is locked and no thread carries messages: a request is one call of the kernel here and one there, and
so is an answer that is small.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from sivae_dist.data.channel import Channel
from sivae_dist.data.procs import Worker, hand_over

Ready = TypeVar("Ready")
Work = Callable[[Any], Any]

_LOOK_S = 1.0  # between looks at whether processes live whose channel others may hold open
_END_S = 1.0  # for a worker to end when it is hung up on, before it is killed
_END = queue.Empty  # what nobody puts into a queue


class LostError(Exception):
    """A worker has ended that should not have; the text says how."""


class LateError(Exception):
    """No answer came in time."""


class Team(Iterator[Any]):
    """The answers. The first exception of a worker is raised when the answer's turn comes, and ends all.

    start:     in a worker, given its number: what makes an answer of a request. Answers that are `bytes` travel as
               they are, others are pickled, with large arrays beside the pickle
    requests:  asked for as they are needed, `ahead` for each worker before the first answer is taken
    timeout_s: for one answer, from when it is waited for

    The death of any worker raises LostError at the next answer. No thread but the one that takes answers may use it,
    except for `stop`.
    """

    def __init__(
        self, start: Callable[[int], Work], count: int, requests: Iterable[Any], *, ahead: int, timeout_s: float
    ) -> None:
        self._requests: Iterator[Any] | None = iter(requests)
        self._timeout_s = timeout_s
        self._asked = self._taken = 0
        self._slow: set[int] = set()  # workers for whom something could not be sent yet
        self._poll = select.poll()
        self.workers: list[Worker] = []
        try:
            for number in range(count):
                self.workers.append(Worker(functools.partial(_serve, start=start, number=number), prompt=True))
                self.workers[-1].channel.patience(timeout_s)
                self._poll.register(self.workers[-1].channel, 0)
            for _ in range(ahead * count):
                self._ask()
        except BaseException:
            self.close()
            raise

    def __next__(self) -> Any:
        if self._taken == self._asked or not self.workers:
            raise StopIteration
        worker = self.workers[self._taken % len(self.workers)]
        channel = worker.channel
        try:
            if not channel.waiting():
                self._wait(channel)
            found = channel.receive()
        except TimeoutError:
            raise LateError from None
        except (EOFError, OSError):
            raise LostError(worker.fate()) from None
        self._taken += 1
        if not isinstance(found, bytes):
            found, error = found
            if error is not None:
                self.close()
                raise error
        self._ask()
        return found

    def stop(self) -> None:
        """Hangs up, by which workers end and who waits for an answer gets LostError. May be called by any thread."""
        for worker in self.workers:
            worker.channel.hang_up()

    def close(self) -> None:
        """Ends all workers; those that do not end by themselves are killed."""
        self.stop()
        workers, self.workers, self._requests = self.workers, [], None
        until = time.monotonic() + _END_S
        for worker in workers:
            worker.end(until)

    def _ask(self) -> None:
        """Sends the next request, of which nothing is waited for: its worker may be waiting to send an answer."""
        request = next(self._requests, _END) if self._requests is not None else _END
        if request is _END:
            self._requests = None
            return
        number = self._asked % len(self.workers)
        self._asked += 1
        try:
            if not self.workers[number].channel.offer(request):
                self._slow.add(number)
        except OSError:  # a worker that has died is told when the next answer is waited for
            pass

    def _wait(self, channel: Channel) -> None:
        """Until it has something. Raises LostError when any worker has hung up, TimeoutError."""
        until = time.monotonic() + self._timeout_s
        awaited, modify = channel.fileno(), self._poll.modify
        if not self._slow:  # in a few calls what comes below: others' code lies in the caches
            modify(awaited, select.POLLIN)
            events = self._poll.poll(min(self._timeout_s, _LOOK_S) * 1e3)
            modify(awaited, 0)
            if events == [(awaited, select.POLLIN)]:
                return
        while True:
            modify(awaited, select.POLLIN)
            for number in self._slow:
                other = self.workers[number].channel
                self._poll.modify(other, select.POLLOUT | (select.POLLIN if other is channel else 0))
            left = until - time.monotonic()
            events = self._poll.poll(min(max(left, 0.0), _LOOK_S) * 1e3)
            lost = {number for number, event in events if event & ~(select.POLLIN | select.POLLOUT)}
            for worker in self.workers:
                # Nobody hangs up who forked a process that holds its end open, too.
                if worker.channel.fileno() in lost if events else not worker.alive():
                    raise LostError(worker.fate())
            self._send_more()
            if any(number == awaited and event & select.POLLIN for number, event in events):
                self._poll.modify(awaited, 0)
                return
            if not events and left <= 0:
                raise TimeoutError

    def _send_more(self) -> None:
        for number in list(self._slow):
            if self.workers[number].channel.flush():
                self._slow.discard(number)
                self._poll.modify(self.workers[number].channel, 0)


def _serve(channel: Channel, start: Callable[[int], Work], number: int) -> None:
    """In a worker: its life."""
    work = start(number)
    while True:
        request = channel.receive()
        try:
            answer, problem = work(request), None
        except Exception as error:
            answer, problem = None, error
        if isinstance(answer, bytes):
            channel.send(answer)
        else:
            hand_over(channel, answer, problem)
        del answer, problem


class InThread(Iterator[Ready], Generic[Ready]):
    """What `prepare` makes of the answers of a team, made in a thread, `depth` ahead: page-locked copies, say.

    enter: called first, in the thread. Exceptions, also of `prepare`, are raised when the turn of their answer comes.
    """

    def __init__(
        self, team: Team, prepare: Callable[[Any], Ready], *, depth: int = 2, enter: Callable[[], object] = lambda: None
    ) -> None:
        self._team, self._prepare, self._enter = team, prepare, enter
        self._ready: queue.Queue[tuple[Ready | None, BaseException | None]] = queue.Queue(depth)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="data-prepare")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._enter()
            for answer in self._team:
                ready = self._prepare(answer)
                del answer  # while there is no room for it, its memory is free
                if not self._put((ready, None)):
                    return
                del ready
            self._put((None, StopIteration()))
        except BaseException as error:
            self._put((None, error))

    def _put(self, item: tuple[Ready | None, BaseException | None]) -> bool:
        while not self._ended.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=0.2)
                return True
        return False

    def __next__(self) -> Ready:
        if self._ended.is_set():
            raise StopIteration
        ready, error = self._ready.get()
        if error is not None:
            self._ended.set()
            raise error
        return ready  # type: ignore[return-value]

    def close(self) -> None:
        """Ends the thread and the team."""
        self._ended.set()
        self._team.stop()
        if self._thread is not threading.current_thread():  # as when it is collected there
            self._thread.join()
        self._team.close()

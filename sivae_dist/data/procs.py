"""Running one function over many tasks in worker processes that neither outlive nor hang their parent.

Each worker has a pipe of its own, and nothing is shared that a killed process could leave locked or half written: a
pool with common queues (concurrent.futures) waits for ever when a worker is killed while it hands a result over.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, TypeVar

from sivae_dist.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
Tick = Callable[[], object]

_TICK_S = 0.3
_WATCH_S = 0.5
_END_S = 30.0  # for workers to end what they do when they are asked to stop
_KILL_S = 5.0


class StoppedError(Exception):
    """Raised inside a task when the parent wants no more of it."""


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def die_with_parent() -> None:
    """Ties this worker process to its parent: it ends soon after the parent, however that ended, and on its request.

    Signals that a scheduler or a terminal sends to the whole group are the parent's to answer (by a checkpoint, say),
    so the worker lives through Ctrl-C, SIGUSR1, SIGUSR2 and through a SIGTERM that is not the parent's.
    """
    creator = multiprocessing.parent_process()
    parent = os.getppid() if creator is None or creator.pid is None else creator.pid

    def watch() -> None:
        while os.getppid() == parent:
            received = signal.sigtimedwait({signal.SIGTERM}, _WATCH_S)
            if received is not None and received.si_pid == parent:
                break
        os._exit(1)

    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # left to the watching thread, which learns the sender
    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


class _Worker:
    """A process that is sent the numbers of tasks, one at a time, and sends back (result, error) of each."""

    def __init__(
        self,
        function: Callable[[Any, Tick], Any],
        tasks: Sequence[Any],
        progress: int,
        stop: Any,
        before: Sequence[_Worker],
    ) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, other = context.Pipe()
        parents = [worker.pipe for worker in (*before, self)]  # ends that only the parent may hold, or they never end
        self.process: ForkProcess = context.Process(
            target=_serve, args=(other, parents, function, tasks, progress, stop), daemon=True
        )
        self.process.start()
        other.close()

    def give(self, number: int | None) -> None:
        """Sends the number of a task, None for the end of all. A worker that has died is noticed in `answer`."""
        with contextlib.suppress(OSError):
            self.pipe.send(number)

    def answered(self) -> bool:
        """Whether there is something to take, its death too, for which the pipe may not end if others hold it open."""
        return self.pipe.poll() or not self.process.is_alive()

    def take(self) -> tuple[Any, BaseException | None]:
        """What it has sent. Raises EOFError or OSError when it died, be it in the middle of sending."""
        if not self.pipe.poll():
            raise EOFError
        answer: tuple[Any, BaseException | None] = self.pipe.recv()
        return answer

    def end(self, until: float) -> None:
        """Waits for its end, which is made to come at `until` (time.monotonic)."""
        self.pipe.close()
        self.process.join(max(0.0, until - time.monotonic()))
        if self.process.is_alive():
            self.process.kill()
            self.process.join(_KILL_S)
        with contextlib.suppress(ValueError):  # stuck in a read of a dead disk: left to the kernel
            self.process.close()


def _serve(
    pipe: Connection[Any, Any],
    parents: Sequence[Connection[Any, Any]],
    function: Callable[[Any, Tick], Any],
    tasks: Sequence[Any],
    progress: int,
    stop: Any,
) -> None:
    """In a worker: its life."""
    for end in parents:
        end.close()
    die_with_parent()

    def tick() -> None:
        if stop.value:
            raise StoppedError
        with contextlib.suppress(BlockingIOError):  # a full pipe only makes the progress bar late
            os.write(progress, b".")

    with contextlib.suppress(EOFError, OSError, StoppedError):  # the parent has gone, or wants no more
        while (number := pipe.recv()) is not None:
            result, problem = None, None
            try:
                result = function(tasks[number], tick)
            except StoppedError:
                raise
            except BaseException as error:
                problem = error
            _send(pipe, result, problem)


def _send(pipe: Connection[Any, Any], result: Any, error: BaseException | None) -> None:
    """Hands an answer over; of what cannot be pickled, the text."""
    if error is not None and not isinstance(error, UserError):
        error.add_note("in a worker process: " + "".join(traceback.format_exception(error)))
    try:
        pipe.send((result, error))
    except OSError:
        raise
    except Exception as problem:
        pipe.send((None, RuntimeError(f"{error or 'a result'} cannot be handed over: {problem}")))


def run_tasks(
    function: Callable[[Task, Tick], Result], tasks: Sequence[Task], workers: int, progress: Callable[[int], object]
) -> Iterator[Result]:
    """Yields function(task, tick) for each task, in order of completion.

    The function calls `tick` once for each unit of work; `progress(n)` is told of them here. workers 0 or 1: in this
    process. An exception in a task ends all of them and is raised here. Raises UserError when a worker dies.
    """
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            yield function(task, lambda: progress(1))
        return
    stop = multiprocessing.get_context("fork").RawValue("b", 0)
    # A pipe instead of a shared counter: a worker killed while it holds a counter's lock would block everyone.
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    team: list[_Worker] = []
    try:
        for number in range(min(workers, len(tasks))):
            team.append(_Worker(function, tasks, writing, stop, team))
            team[-1].give(number)
        following, busy = iter(range(len(team), len(tasks))), {worker.pipe: worker for worker in team}
        while busy:
            wait(list(busy), timeout=_TICK_S)
            _drain(reading, progress)
            for worker in [worker for worker in busy.values() if worker.answered()]:
                try:
                    result, error = worker.take()
                except (EOFError, OSError):
                    raise UserError(
                        "a worker process was killed, probably because memory ran out",
                        "run the same command again with fewer --workers; finished work is kept",
                    ) from None
                if error is not None:
                    raise error
                more = next(following, None)
                if more is None:
                    del busy[worker.pipe]
                worker.give(more)
                yield result
    finally:
        stop.value = 1
        until = time.monotonic() + _END_S
        for worker in team:
            worker.give(None)
        for worker in team:
            worker.end(until)
        os.close(reading)
        os.close(writing)


def _drain(reading: int, progress: Callable[[int], object]) -> None:
    with contextlib.suppress(BlockingIOError):
        while data := os.read(reading, 1 << 16):
            progress(len(data))

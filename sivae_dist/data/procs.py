"""Worker processes that neither outlive nor hang their parent, and running one function over many tasks in them.

Each worker has a channel of its own, and nothing is shared that a killed process could leave locked or half written: a
pool with common queues (concurrent.futures) waits for ever when a worker is killed while it hands a result over.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import multiprocessing
import os
import select
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from typing import Any, TypeVar

from sivae_dist.data.channel import Channel, pair
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


def mind_parent(channel: Channel, *, prompt: bool) -> None:
    """Ties this worker process to its parent: it ends soon after the parent, however that ended.

    prompt: it also ends at once when the parent hangs up, whatever it is doing.

    Signals that a scheduler or a terminal sends to the whole group are the parent's to answer (by a checkpoint, say),
    so the worker lives through Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2. The parent needs no signal of these: of two that
    come at the same time only one may arrive, and who sent the other is lost.
    """
    creator = multiprocessing.parent_process()
    parent = os.getppid() if creator is None or creator.pid is None else creator.pid
    ended = select.poll()
    if prompt:
        ended.register(channel.fileno(), 0)  # nothing but its end

    def watch() -> None:
        while os.getppid() == parent and not ended.poll(_WATCH_S * 1e3):
            pass
        os._exit(1)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


class Worker:
    """A process forked from this one, and a channel to it. Runs `life` there; see `mind_parent` for prompt."""

    def __init__(self, life: Callable[[Channel], None], *, prompt: bool = False) -> None:
        self.channel, other = pair()
        _workers.add(self)
        context = multiprocessing.get_context("fork")
        self.process: ForkProcess = context.Process(target=_live, args=(other, life, prompt), daemon=True)
        self.process.start()
        other.close()

    def alive(self) -> bool:
        """Whether the process runs. Its channel may not end if others that it forked hold it open."""
        return self.process.is_alive()

    def fate(self) -> str:
        """In words, how a process ended that hung up."""
        self.process.join(_KILL_S)
        code = self.process.exitcode
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"process {self.process.pid} by {signal.Signals(-code).name}"
        return f"process {self.process.pid}, status {code}"

    def end(self, until: float) -> None:
        """Hangs up and waits for its end, which is made to come at `until` (time.monotonic)."""
        self.channel.hang_up()
        self.channel.close()
        _workers.discard(self)
        self.process.join(max(0.0, until - time.monotonic()))
        if self.process.is_alive():
            self.process.kill()
            self.process.join(_KILL_S)
        with contextlib.suppress(ValueError):  # stuck in a read of a dead disk: left to the kernel
            self.process.close()


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


def _close_others() -> None:
    """In a process just forked: the ends of workers' channels that only the parent may hold, or they never end."""
    for worker in list(_workers):
        worker.channel.close()
    _workers.clear()


def _end_all() -> None:
    """When the interpreter ends: multiprocessing would ask them by SIGTERM, which they ignore, and wait."""
    for worker in list(_workers):
        worker.end(0.0)


os.register_at_fork(after_in_child=_close_others)
atexit.register(_end_all)  # after multiprocessing's own, which was imported above: so it runs before that


def _live(channel: Channel, life: Callable[[Channel], None], prompt: bool) -> None:
    """In a worker."""
    mind_parent(channel, prompt=prompt)
    gc.freeze()  # what it inherited is not looked at again: that would copy its pages
    with contextlib.suppress(EOFError, OSError):  # the parent has gone, or wants no more
        life(channel)


def hand_over(channel: Channel, result: Any, error: BaseException | None) -> None:
    """In a worker: sends (result, error); of what cannot be pickled, the text."""
    if error is not None and not isinstance(error, UserError):
        error.add_note("in a worker process: " + "".join(traceback.format_exception(error)))
    try:
        channel.send((result, error))
    except OSError:
        raise
    except Exception as problem:
        channel.send((None, RuntimeError(f"{error or 'a result'} cannot be handed over: {problem}")))


def _serve(
    channel: Channel, function: Callable[[Any, Tick], Any], tasks: Sequence[Any], progress: int, stop: Any
) -> None:
    """In a worker of `run_tasks`: is sent the numbers of tasks, one at a time; None ends it."""

    def tick() -> None:
        if stop.value:
            raise StoppedError
        with contextlib.suppress(BlockingIOError):  # a full pipe only makes the progress bar late
            os.write(progress, b".")

    with contextlib.suppress(StoppedError):
        while (number := channel.receive()) is not None:
            result, problem = None, None
            try:
                result = function(tasks[number], tick)
            except StoppedError:
                raise
            except BaseException as error:
                problem = error
            hand_over(channel, result, problem)


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
    life = functools.partial(_serve, function=function, tasks=tasks, progress=writing, stop=stop)
    team: list[Worker] = []
    try:
        for number in range(min(workers, len(tasks))):
            team.append(Worker(life))
            _give(team[-1], number)
        following, busy = iter(range(len(team), len(tasks))), {w.channel.fileno(): w for w in team}
        while busy:
            answered = wait(list(busy), timeout=_TICK_S)
            _drain(reading, progress)
            for end, worker in [(end, w) for end, w in busy.items() if end in answered or not w.alive()]:
                try:
                    if end not in answered and not wait([end], timeout=0):
                        raise EOFError
                    result, error = worker.channel.receive()
                except (EOFError, OSError):
                    raise UserError(
                        "a worker process was killed, probably because memory ran out",
                        "run the same command again with fewer --workers; finished work is kept",
                    ) from None
                if error is not None:
                    raise error
                more = next(following, None)
                if more is None:
                    del busy[end]
                _give(worker, more)
                yield result
    finally:
        stop.value = 1
        until = time.monotonic() + _END_S
        for worker in team:
            _give(worker, None)
            worker.channel.hang_up()
        for worker in team:
            worker.end(until)
        os.close(reading)
        os.close(writing)


def _give(worker: Worker, number: int | None) -> None:
    """Sends the number of a task, None for the end of all. That a worker has died is noticed elsewhere."""
    with contextlib.suppress(OSError):
        worker.channel.send(number)


def _drain(reading: int, progress: Callable[[int], object]) -> None:
    with contextlib.suppress(BlockingIOError):
        while data := os.read(reading, 1 << 16):
            progress(len(data))

"""Running one function over many tasks in worker processes that neither outlive nor hang their parent."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from sivae_dist.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
Tick = Callable[[], object]

_TICK_S = 0.3
_WATCH_S = 0.5


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


_in_worker: dict[str, Any] = {}


def _start_worker(function: Any, progress: int, stop: Any) -> None:
    die_with_parent()
    _in_worker.update(function=function, progress=progress, stop=stop)


def _tick_in_worker() -> None:
    if _in_worker["stop"].value:
        raise StoppedError
    with contextlib.suppress(BlockingIOError):  # a full pipe only makes the progress bar late
        os.write(_in_worker["progress"], b".")


def _call(task: Any) -> Any:
    return _in_worker["function"](task, _tick_in_worker)


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
    context = multiprocessing.get_context("fork")
    stop = context.RawValue("b", 0)
    # A pipe instead of a shared counter: a worker killed while it holds a counter's lock would block everyone.
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=context, initializer=_start_worker, initargs=(function, writing, stop)
    )
    try:
        pending = {pool.submit(_call, task) for task in tasks}
        while pending:
            done, pending = wait(pending, timeout=_TICK_S, return_when=FIRST_COMPLETED)
            _drain(reading, progress)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, probably because memory ran out",
            "run the same command again with fewer --workers; finished work is kept",
        ) from None
    finally:
        stop.value = 1
        pool.shutdown(wait=True, cancel_futures=True)
        os.close(reading)
        os.close(writing)


def _drain(reading: int, progress: Callable[[int], object]) -> None:
    with contextlib.suppress(BlockingIOError):
        while data := os.read(reading, 1 << 16):
            progress(len(data))

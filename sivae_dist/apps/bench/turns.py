"""Several things measured in turns within one run, each in a process of its own.

What a process sets for itself (how the C library keeps memory, which kernels run, what a device holds) stays out of
the others, and a change of clocks or a busy machine hits all of them.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from sivae_dist.errors import UserError

M = TypeVar("M")
Start = Callable[[], Callable[[int], M]]  # called in the process; what it returns measures a block of so many steps


def in_turns(
    starts: Mapping[str, Start[M]], *, seconds: float, spent: Callable[[M], float], block: int, warm_up: int = 2
) -> dict[str, list[M]]:
    """name -> what its blocks measured, at least three of each, about `seconds` each by what `spent` reads off them.

    starts: by name, made so that they can be pickled. Raises UserError if one cannot begin or ends.
    """
    context = multiprocessing.get_context("spawn")
    measured: dict[str, list[M]] = {name: [] for name in starts}
    with ExitStack() as stack:
        pipes: dict[str, Connection] = {}
        for name, start in starts.items():
            pipes[name], theirs = context.Pipe()
            process = context.Process(target=_serve, args=(start, theirs), daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(pipes[name].close)  # which ends it
            theirs.close()
        _turn(pipes, warm_up)
        total, blocks = 0.0, 0
        while total < seconds * len(starts) or blocks < 3:
            for name, each in _turn(pipes, block).items():
                measured[name].append(each)
                total += spent(each)
            blocks += 1
    return measured


def _turn(pipes: dict[str, Connection], count: int) -> dict[str, Any]:
    """A block of each, one after the other."""
    found = {}
    for name, pipe in pipes.items():
        try:
            pipe.send(count)
            answer = pipe.recv()
        except (EOFError, OSError):
            raise UserError(f"the process that measures {name!r} has ended", "see the message above") from None
        if isinstance(answer, UserError):
            raise UserError(f"{name}: {answer.what}", answer.fix)
        found[name] = answer
    return found


def _serve(start: Start[Any], pipe: Connection) -> None:
    """Measures blocks until nobody asks any more. A user's mistake is the answer to the first question."""
    try:
        try:
            block = start()
        except UserError as error:
            pipe.recv()
            pipe.send(error)
            return
        while True:
            pipe.send(block(pipe.recv()))
    except (EOFError, BrokenPipeError):
        return

"""The boundary where what went wrong becomes a message and an exit status."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from sivae_dist.distributed import launcher
from sivae_dist.errors import UserError

INTERRUPTED, TERMINATED = 130, 143
_MACHINE = (  # what a file system or a limit answers, as opposed to a defect of this program
    "ENOSPC EDQUOT EROFS EIO EACCES EPERM EMFILE ENFILE ENOTDIR EISDIR ENAMETOOLONG ESTALE ENOENT ENODEV ENXIO"
)
_NO_MEMORY = ("can't allocate memory", "out of memory", "cannot allocate memory", "cuda_error_out_of_memory")


def guarded(command: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Runs a command; what the user can mend is printed without a traceback and ends the process with status 2.

    Under several processes a message names its rank, and one that all ranks share is printed once. Ctrl-C gives status
    130, SIGTERM 143. Anything else is a defect of this program and keeps its traceback.
    """
    launcher.remember()
    for stream in (sys.stdout, sys.stderr):  # names read from files may hold what the terminal cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    with _interruptible():
        try:
            command(arguments)
            if _several():
                _leave(0)
        except KeyboardInterrupt as interrupt:
            with contextlib.suppress(ValueError):
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough: no traceback from the clean-up
            terminated = isinstance(interrupt, Terminated)
            _leave(TERMINATED if terminated else INTERRUPTED, "terminated" if terminated else "interrupted")
        except BrokenPipeError:
            os._exit(0)
        except Exception as error:
            told = error if isinstance(error, UserError) else explain(error)
            if told is None:
                _mark_failed()
                raise
            _fail(told)


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """Handler of Ctrl-C while nothing is worth saving: an exception inside an import may be swallowed or garbled."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


class Terminated(KeyboardInterrupt):
    """SIGTERM, where it raises."""


def interrupts_raise() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt and SIGTERM a kind of it, so that `finally` clauses clean up."""
    with contextlib.suppress(ValueError):  # signals can be set in the main thread only
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, _terminated)


def _terminated(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the clean-up is under way
    raise Terminated


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    before: Any = None
    with contextlib.suppress(ValueError):
        before = signal.getsignal(signal.SIGINT)
        if before is signal.default_int_handler:  # else the caller (nohup, a shell script) has other wishes
            signal.signal(signal.SIGINT, leave_at_once)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, TypeError):
            if before is not None and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                signal.signal(signal.SIGINT, before)


def explain(error: Exception) -> UserError | None:
    """A UserError for a state of the machine that surfaced as some other exception; None for anything else."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in _MACHINE.split():
        where = f"{error.filename}: " if error.filename else ""
        return UserError(
            f"{where}{error.strerror}",
            "make room, or mend the disk or the permissions, and run the same command again: finished work is kept",
        )
    if isinstance(error, ImportError) and not (error.name or "").startswith("sivae_dist"):
        return UserError(
            f"a package is missing or broken: {text}",
            "pip install sivae-dist (in a checkout: pip install -c constraints.txt -e .) installs it; `sivae-dist "
            "doctor` looks at all of them",
        )
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _mentions(text, _NO_MEMORY)):
        return UserError(
            f"out of memory: {text or 'the host has no more'}"[:500],
            "lower train.batch (of a growing model progressive.batch), or raise train.accumulation, or check model.* "
            "and data.* for a number that is too big; "
            "`--dry-run` predicts the memory",
        )
    return _lost(error)


def _lost(error: Exception) -> UserError | None:
    """The error of a collective whose partner has gone. Silent, as a UserError without text, if that one told why."""
    if "torch" not in sys.modules:
        return None
    from sivae_dist.distributed import failure  # noqa: PLC0415 (torch is loaded already)

    if not failure.lost_peer(error):
        return None
    if failure.announced():
        return UserError("")
    first_line = str(error).strip().splitlines()[0][:200]
    return UserError(
        f"another rank has gone or did not answer ({first_line})",
        "look for its message above or on its machine; the same command resumes from the last checkpoint",
    )


def _fail(error: UserError) -> NoReturn:
    message = f"{error.what}\n  fix: {error.fix}" if error.fix else error.what
    if not _several():
        _leave(2, f"error: {message}")
    from sivae_dist.distributed import failure  # noqa: PLC0415 (a single process may do without torch)

    if error.what and failure.announce("lost" if error.what.startswith("another rank has gone") else message):
        _leave(2, f"error (rank {os.environ.get('RANK', '?')}): {message}")
    _leave(2)


def _mark_failed() -> None:
    if _several() and "torch" in sys.modules:
        from sivae_dist.distributed import failure  # noqa: PLC0415

        failure.announce("")


def _several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ


def _mentions(text: str, words: tuple[str, ...]) -> bool:
    return any(word in text.lower() for word in words)


def _leave(status: int, message: str = "") -> NoReturn:
    with contextlib.suppress(OSError):
        if message:
            print(message, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    if _several():  # a process that leaves its group half way may abort in a destructor instead of exiting
        os._exit(status)
    sys.exit(status)

"""The process that started this one, where that is a launcher: training does not outlive it for long.

A launcher may die and leave its ranks behind: `accelerate launch` of one process handles no signal at all, and that of
several none but SIGTERM, SIGINT, SIGHUP and SIGQUIT, so that SIGUSR1 kills it, as SIGKILL does. The ranks, which saw no
signal, would train on without anyone, and keep the devices and the run's lock from the command that resumes.

So the parent is compared with that of the beginning, once an iteration: one system call, on every system. Linux could
send a signal instead when the parent dies (PR_SET_PDEATHSIG), but it means the end of the thread that forked, which is
not always that of the process, misses a parent that died before, and has to be asked for through a foreign function.

Only a parent that is a launcher counts: `nohup sivae-dist train &` outlives its shell.
"""

from __future__ import annotations

import os

# What accelerate sets for its one process, all of them, and torchelastic for each of several. Single ones may have been
# exported by hand: ACCELERATE_USE_CPU or ACCELERATE_MIXED_PRECISION in a shell make no launcher of it.
_OF_ACCELERATE = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE")
_OF_TORCHELASTIC = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
OWN = "SIVAE_LAUNCHED"  # what a command of ours sets for the training that it starts

_parents: dict[int, int] = {}  # by process, since a forked one has another parent


def remember() -> int:
    """The parent's process number when this was first called: early, so that no later death is missed."""
    return _parents.setdefault(os.getpid(), os.getppid())


def launched() -> bool:
    """Whether a launcher started this process, by the environment."""
    return any(all(name in os.environ for name in names) for names in (_OF_ACCELERATE, _OF_TORCHELASTIC, (OWN,)))


def gone() -> bool:
    """Whether a launcher started this process and has ended since."""
    return os.getppid() != remember() and launched()

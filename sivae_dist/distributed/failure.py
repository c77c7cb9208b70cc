"""One rank's failure ends all ranks soon, and is told once.

Processes started together share a small key-value store (the launcher's, or rank 0's). A rank that fails leaves a mark
there; a thread in every other rank looks for it, because the rank itself may be waiting in a collective that the failed
one will never join. Without it such a rank would hang until the collective's timeout, or until the launcher kills it.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

STATUS = 2  # of every rank of a failed run
_LOOK_EVERY_S = 1.0
_GRACE_S = 5.0  # for a rank to end by itself once another one failed
_CONNECT = timedelta(seconds=5)
_LOST = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "socket", "store")

_stop = threading.Event()


def ranks() -> int:
    """The number of processes that were launched together, by the environment."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() else 1


def watch() -> None:
    """Begins to look for another rank's failure, if there are other ranks and a store; ends this process on one."""
    if ranks() > 1 and (store := _store()) is not None:
        _stop.clear()
        threading.Thread(target=_look, args=(store,), daemon=True, name="failure-watch").start()


def unwatch() -> None:
    """Ends the looking; done before the ranks part in peace."""
    _stop.set()


def announce(message: str) -> bool:
    """Marks this run as failed. Returns whether this rank is the first with this message and should print it.

    An empty message only marks.
    """
    store = _store() if ranks() > 1 else None
    if store is None:
        return True
    try:
        first = not message or store.add(_key(hashlib.sha256(message.encode()).hexdigest()), 1) == 1
        store.set(_key("any"), "1")
    except RuntimeError:
        return True
    return first


def announced(wait_s: float = 3.0) -> bool:
    """Whether some rank has marked the run as failed, after waiting a little for a mark on its way."""
    store = _store() if ranks() > 1 else None
    deadline = time.monotonic() + wait_s
    while store is not None:
        try:
            if store.check([_key("any")]):
                return True
        except RuntimeError:
            return False
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return False


def lost_peer(error: BaseException) -> bool:
    """Whether this is what a collective raises when another rank has gone."""
    if ranks() == 1 or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _LOST)


def _key(name: str) -> str:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"sivae_dist/failed/{attempt}/{name}"


def _store() -> Store | None:
    """A connection of its own to the store the ranks met by; None where there is none (yet)."""
    from_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not (from_launcher or (dist.is_available() and dist.is_initialized())):
        return None
    try:
        return TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_CONNECT,
            wait_for_workers=False,
        )  # fmt: skip
    except (KeyError, ValueError, RuntimeError):
        return None


def _look(store: Store) -> None:
    while not _stop.wait(_LOOK_EVERY_S):
        try:
            failed = store.check([_key("any")])
        except RuntimeError:  # the store has gone with its process: the launcher deals with that
            return
        if failed:
            if not _stop.wait(_GRACE_S):
                sys.stderr.flush()
                os._exit(STATUS)
            return

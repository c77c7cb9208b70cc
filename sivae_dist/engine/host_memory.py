"""Keeping freed host memory for the next tensor.

The C library gives the top of its heap back to the system as soon as some hundred kB of it are free, and asks for it
again with the next tensor. Each page is then filled with zeros anew: with activations of half a MB that can take
longer than the arithmetic. Training frees and takes the same sizes in every iteration, so a run on a CPU keeps them.
"""

from __future__ import annotations

import ctypes
import logging

log = logging.getLogger(__name__)

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_MMAP = 32 << 20  # the most that glibc allows: larger tensors have pages of their own, given back when freed


def keep_freed(megabytes: int) -> bool:
    """From now on this process keeps up to so much freed memory. Says whether the C library could be told to.

    0 leaves everything as it is. Only glibc knows how; elsewhere nothing is changed.
    """
    if megabytes <= 0:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl, macOS
        return False
    size = min(megabytes << 20, (1 << 31) - 1)  # it takes an int
    told = all(
        [
            mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP),
            mallopt(_M_TRIM_THRESHOLD, size),
            mallopt(_M_TOP_PAD, min(size, 64 << 20)),
        ]
    )
    log.info("the process keeps up to %d MB of freed memory: %s", megabytes, "yes" if told else "refused")
    return told

"""Freed memory that is kept costs no page faults when it is used again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Pages touched for the first time while 64 pieces of 1 MB are taken, filled and freed ten times.
_COUNT = """
import ctypes, resource, sys
from sivae_dist.engine.host_memory import keep_freed
told = keep_freed(int(sys.argv[1]))
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def work():
    for _ in range(10):
        for piece in [libc.memset(libc.malloc(1 << 20), 1, 1 << 20) for _ in range(64)]:
            libc.free(piece)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(int(told), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.dist
def test_kept_memory_is_not_faulted_in_again() -> None:
    faults = {}
    for megabytes in (0, 64):
        done = subprocess.run(
            [sys.executable, "-c", _COUNT, str(megabytes)], capture_output=True, text=True, check=True
        )
        told, faults[megabytes] = map(int, done.stdout.split())
        assert told == (megabytes > 0)
    assert faults[64] < 100
    assert faults[0] > 10_000

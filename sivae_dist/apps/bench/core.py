"""Timing several implementations of the same call against each other and against what the device can do at most.

All implementations of a case take turns within one run, so that a change of clocks or a busy machine hits all of them.
Each call gets the next of several sets of inputs, together larger than the caches, so that the data come from memory.
Times are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = tuple[Any, ...]
_BEYOND_CACHES = 256 << 20  # bytes of all inputs together; caches hold 30 to 130 MiB
_MOST_SETS = 128
_SHORTEST, _LONGEST = 1 << 18, 1 << 26  # cycles that a device is made to wait: some 0.1 and 30 ms


@dataclass(frozen=True)
class Case:
    """One call with its costs.

    inputs: makes one set of inputs. calls: the implementations by name, each called with one set; the first one is
    measured against the others. bytes: what must be read and written at least; flops: multiply-adds count two.
    """

    operator: str
    name: str
    inputs: Callable[[], Inputs]
    calls: dict[str, Callable[..., object]]
    bytes: int
    flops: int


@dataclass(frozen=True)
class Ceiling:
    """What the device reached in this run: bytes a second of a copy, FLOPs a second of a matrix product."""

    copy: float
    matrix: float


@dataclass
class Result:
    """Median seconds by implementation, and what they are worth."""

    case: Case
    seconds: dict[str, float]
    failures: dict[str, str] = field(default_factory=dict)

    def row(self, ceiling: Ceiling) -> dict[str, object]:
        """For a report: times in ms, fractions, ratios (above 1: the first implementation is faster)."""
        ours, first = next(iter(self.seconds)), next(iter(self.seconds.values()))
        at_best = max(self.case.bytes / ceiling.copy, self.case.flops / ceiling.matrix)
        return {
            "operator": self.case.operator,
            "case": self.case.name,
            "implementation": ours,
            "ms": {name: seconds * 1e3 for name, seconds in self.seconds.items()},
            "bytes": self.case.bytes,
            "flops": self.case.flops,
            "of_copy_bandwidth": self.case.bytes / first / ceiling.copy,
            "of_matrix_rate": self.case.flops / first / ceiling.matrix,
            "limit": "memory" if at_best == self.case.bytes / ceiling.copy else "arithmetic",
            "speedup": {name: seconds / first for name, seconds in self.seconds.items() if name != ours},
            "failed": self.failures,
        }


def measure(case: Case, device: torch.device, seconds: float) -> Result:
    """Times all implementations for about `seconds` each. One to compare with that fails is named in the result."""
    one = case.inputs()
    size = sum(t.nbytes for t in one if isinstance(t, Tensor))
    sets = [one] + [case.inputs() for _ in range(min(_MOST_SETS, _BEYOND_CACHES // max(size, 1) + 1) - 1)]
    calls, failures = dict(case.calls), {}
    for name, call in case.calls.items():
        try:
            for inputs in (sets * 3)[:3]:  # compilation, allocation, caches of libraries
                call(*inputs)
            _wait(device)
        except Exception as error:  # a compiler may fail in any way; the others are still worth measuring
            if name == next(iter(case.calls)):
                raise
            del calls[name]
            failures[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    ahead = {name: _head_start(call, sets, device) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    position = 0
    deadline = time.monotonic() + seconds * max(len(calls), 1)
    while calls and (time.monotonic() < deadline or len(next(iter(times.values()))) < 3):
        for name, call in calls.items():
            position += 1
            times[name].append(_timed(call, sets[position % len(sets)], device, ahead[name]))
    return Result(case, {name: statistics.median(values) for name, values in times.items()}, failures)


def ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """Measures a copy and a matrix product of this type, each large enough to be limited by nothing else."""
    large = device.type == "cuda"
    source = torch.ones((1 << 30 if large else 1 << 27) // 4, device=device)
    target, n = torch.empty_like(source), 8192 if large else 1024
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    copy = statistics.median(_repeated(lambda: target.copy_(source), device))
    product = statistics.median(_repeated(lambda: torch.mm(a, b), device))
    return Ceiling(2 * source.nbytes / copy, 2 * n**3 / product)


def _repeated(call: Callable[[], object], device: torch.device) -> Iterator[float]:
    for _ in range(3):
        call()
    ahead = _head_start(call, [()], device)
    for _ in range(10):
        yield _timed(call, (), device, ahead)


def _head_start(call: Callable[..., object], sets: list[Inputs], device: torch.device) -> int:
    """How many cycles a CUDA device must wait so that the host has launched a whole call before the device begins.

    Else a call of small kernels would show the host's time. Doubled until three calls in a row were launched in time,
    then twice that, as a host is slower now and then. A call that waits for the device itself never is; it gets the
    shortest wait.
    """
    cycles = _SHORTEST
    while device.type == "cuda" and cycles <= _LONGEST:
        if all([_between_events(call, inputs, cycles)[1] for inputs in (sets * 3)[:3]]):
            return 2 * cycles
        cycles *= 2
    return _SHORTEST


def _timed(call: Callable[..., object], inputs: Inputs, device: torch.device, ahead: int) -> float:
    """Seconds of one call. On CUDA between two events, with the host `ahead` cycles ahead, not to count."""
    if device.type == "cuda":
        return _between_events(call, inputs, ahead)[0]
    began = time.perf_counter()
    call(*inputs)
    return time.perf_counter() - began


def _between_events(call: Callable[..., object], inputs: Inputs, cycles: int) -> tuple[float, bool]:
    """(seconds on the device, which first waits; whether all was launched before it had waited so long)."""
    cuda: Any = torch.cuda
    first, last = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    cuda._sleep(cycles)
    first.record()
    call(*inputs)
    last.record()
    in_time = not first.query()  # the device has not even come to the first event
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3, in_time


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

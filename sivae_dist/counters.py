"""Randomness from position: every draw is a pure function of (seed, purpose, sample number, element).

Nothing here has a state, so a draw depends neither on the number of ranks and workers nor on what was drawn before, and
there is no generator to save: a killed and resumed run sees the same noise. The mixing function is the finaliser of
SplitMix64 (Steele, Lea, Flood 2014), applied to keyed counters; NumPy and torch versions give the same 64 bits. Own
permutations are used instead of numpy.random's because NumPy reserves the right to change its streams between versions,
and a resumed run may meet another version.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_M1 = 0xBF58476D1CE4E5B9
_M2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """SplitMix64 finaliser on a Python integer, 64 bits in and out."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * _M1) & _MASK
    value = ((value ^ (value >> 27)) * _M2) & _MASK
    return value ^ (value >> 31)


def key(seed: int, *purpose: str | int) -> int:
    """A 64-bit key for a purpose, e.g. key(seed, "noise", "prior"). Stable across platforms and versions."""
    state = mix(seed * _GOLDEN + 1)
    for part in purpose:
        number = zlib.crc32(part.encode()) | (1 << 40) if isinstance(part, str) else int(part)
        state = mix(state + (number & _MASK) * _GOLDEN + 0x632BE59BD9B4E019)
    return state


def hash64(counter_key: int, numbers: np.ndarray) -> np.ndarray:
    """uint64 hashes of uint64 numbers, elementwise, under a key."""
    with np.errstate(over="ignore"):
        h = np.asarray(numbers, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(counter_key)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(_M1)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(_M2)
        return h ^ (h >> np.uint64(31))


def permutation(counter_key: int, length: int) -> np.ndarray:
    """A seeded permutation of range(length), int64. Sorting by hash: O(n log n), the same everywhere and for ever."""
    return np.argsort(hash64(counter_key, np.arange(length, dtype=np.uint64)), kind="stable")


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(h: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (h >> bits) & ((1 << (64 - bits)) - 1)


def _mix_tensor(h: Tensor) -> Tensor:
    h = (h ^ _shift(h, 30)) * _signed(_M1)
    h = (h ^ _shift(h, 27)) * _signed(_M2)
    return h ^ _shift(h, 31)


def hash64_tensor(counter_key: int, numbers: Tensor) -> Tensor:
    """As `hash64`, on an int64 tensor (two's complement wraps exactly as unsigned arithmetic does)."""
    return _mix_tensor(numbers * _signed(_GOLDEN) + _signed(counter_key))


def normal(counter_key: int, samples: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Standard normal draws of shape (len(samples), *shape): row i depends only on (counter_key, samples[i]).

    samples: int64 (B,), the global numbers of the samples, on the device where the noise is wanted.
    Box-Muller on two 53-bit uniforms per pair of elements, computed in float64 and rounded once to `dtype`.
    """
    size = math.prod(shape)
    pairs = (size + 1) // 2
    rows = hash64_tensor(counter_key, samples)[:, None]
    element = torch.arange(2 * pairs, dtype=torch.int64, device=samples.device)[None]
    bits = _mix_tensor(rows + element * _signed(_GOLDEN))
    uniform = (_shift(bits, 11).double() + 0.5) * 2.0**-53
    radius = (-2.0 * uniform[:, :pairs].log()).sqrt()
    angle = (2.0 * math.pi) * uniform[:, pairs:]
    draws = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return draws[:, :size].to(dtype).reshape(len(samples), *shape)


def coin(counter_key: int, numbers: np.ndarray) -> np.ndarray:
    """A fair seeded bit per number (bool): the mirror decision of a sample, for instance."""
    return (hash64(counter_key, numbers) >> np.uint64(63)).astype(bool)


def uniform(counter_key: int, numbers: np.ndarray) -> np.ndarray:
    """A seeded number in (0, 1) per number (float64)."""
    return ((hash64(counter_key, numbers) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

"""A number that stands for the bits of tensors: equal tensors, equal number; one flipped bit, another one.

Every element is mixed with its name and place into 64 bits (the finaliser of SplitMix64, see `counters`), and these are
added up modulo 2^64. So it is computed where the tensors lie, in pieces, without a copy of them on the host, and what
is added up in parts on several ranks gives the same number as the whole. It guards against accidents, not against
somebody who wants two tensors to look alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sivae_dist import counters

_MASK = (1 << 64) - 1
# Elements at once: within the caches of a CPU; on other devices few launches, 8 bytes an element several times.
_PIECE = {"cpu": 1 << 16}
_PIECE_ELSEWHERE = 1 << 23
_BITS = {8: torch.int32, 4: torch.int32, 2: torch.int16, 1: torch.int8}  # of 8 bytes each half on its own


@dataclass(frozen=True)
class Digest:
    """hash: of the bits, 16 hexadecimal digits. norm: square root of the sum of squares, which tells how far apart
    tensors of different bits are."""

    hash: str
    norm: float


def digest(tensors: Mapping[str, Tensor]) -> Digest:
    """Of named tensors of any shapes and types, in any memory format. Waits for their devices."""
    sums: dict[torch.device, Tensor] = {}
    squares: dict[torch.device, Tensor] = {}
    for name, tensor in tensors.items():
        flat, place = tensor.detach().reshape(-1), tensor.device
        if place not in sums:
            sums[place] = torch.zeros((), dtype=torch.int64, device=place)
            squares[place] = torch.zeros((), dtype=torch.float64, device=place)
        sums[place] += _hash(counters.key(0, "digest", name, *tensor.shape), flat)
        if flat.is_floating_point() and flat.numel():
            squares[place] += torch.linalg.vector_norm(flat, dtype=torch.float64) ** 2
    total = sum(int(value) for value in sums.values()) & _MASK
    return Digest(f"{total:016x}", math.sqrt(sum(float(value) for value in squares.values())))


def rows(key: int, numbers: Tensor, values: Tensor) -> Tensor:
    """Hash of samples: values (B, ...) that belong to the sample numbers (B,) int64. An int64 scalar.

    The sum over the ranks does not depend on which rank has which sample, nor on the order of the samples.
    """
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for number, row in zip(counters.hash64_tensor(key, numbers).tolist(), values.detach(), strict=True):
        total += _hash(number & _MASK, row.reshape(-1))
    return total


def _hash(key: int, flat: Tensor) -> Tensor:
    """Sum over places of mix(bits, place) under a key, int64. flat: (n,)."""
    bits = flat.contiguous().view(_BITS[flat.element_size()]) if flat.dtype != torch.bool else flat.to(torch.int8)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(bits), _PIECE.get(flat.device.type, _PIECE_ELSEWHERE)):
        piece = bits[start : start + _PIECE.get(flat.device.type, _PIECE_ELSEWHERE)].long()
        place = torch.arange(start, start + len(piece), dtype=torch.int64, device=flat.device)
        total += counters.hash64_tensor(key, piece + (place << 32)).sum()  # 32 bits each: no two pairs are one number
    return total

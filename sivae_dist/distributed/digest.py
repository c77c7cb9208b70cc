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
from typing import Any

import torch
from torch import Tensor

from sivae_dist import counters
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.sharding import distributed

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


def digest(tensors: Mapping[str, Tensor], group: Group | None = None) -> Digest:
    """Of named tensors of any shapes and types, in any memory format, whole or in shards. Waits for their devices.

    group: the ranks that hold the shards, where there are any; then collective, and the same as of the whole tensors.
    """
    here, shards = _Sums(), _Sums()
    for name, tensor in tensors.items():
        key = counters.key(0, "digest", name, *tensor.shape)
        if distributed(tensor):
            shards.add(key, *_part(tensor.detach()))
        else:
            here.add(key, tensor.detach().reshape(-1), 0)
    total, squares = here.read()
    if group is not None and group.ranks > 1 and any(map(distributed, tensors.values())):
        part, part_squares = shards.read()
        signed = part - (1 << 64) if part >> 63 else part
        total += int(group.sum_(torch.tensor([signed], device=group.device())))
        squares += float(group.sum_(torch.tensor([part_squares], dtype=torch.float64, device=group.device())))
    return Digest(f"{total & _MASK:016x}", math.sqrt(squares))


class _Sums:
    """Hashes and squares, added up on each device until they are read."""

    def __init__(self) -> None:
        self.hashes: dict[torch.device, Tensor] = {}
        self.squares: dict[torch.device, Tensor] = {}

    def add(self, key: int, flat: Tensor, first: int) -> None:
        place = flat.device
        if place not in self.hashes:
            self.hashes[place] = torch.zeros((), dtype=torch.int64, device=place)
            self.squares[place] = torch.zeros((), dtype=torch.float64, device=place)
        self.hashes[place] += _hash(key, flat, first)
        if flat.is_floating_point() and flat.numel():
            self.squares[place] += torch.linalg.vector_norm(flat, dtype=torch.float64) ** 2

    def read(self) -> tuple[int, float]:
        total = sum(int(value) for value in self.hashes.values()) & _MASK
        return total, sum(float(value) for value in self.squares.values())


def _part(tensor: Any) -> tuple[Tensor, int]:
    """What this rank adds for a DTensor: its elements as (n,), and the place of the first of them in the whole."""
    mesh, rows, chunk, counted = tensor.device_mesh, tensor.shape[0] if tensor.dim() else 1, 0, True
    for dimension, placement in enumerate(tensor.placements):
        rank = mesh.get_local_rank(dimension)
        if placement.is_replicate():
            counted &= rank == 0  # one of the copies
        elif placement.is_shard(0) and not chunk:
            chunk, own = -(-rows // mesh.size(dimension)), rank
        else:
            raise NotImplementedError(f"a digest of a tensor distributed as {tensor.placements}")
    flat = tensor.to_local().reshape(-1) if counted else tensor.to_local().reshape(-1)[:0]
    first = min(chunk * own, rows) if chunk else 0
    return flat, first * (tensor.numel() // max(rows, 1))


def rows(key: int, numbers: Tensor, values: Tensor) -> Tensor:
    """Hash of samples: values (B, ...) that belong to the sample numbers (B,) int64. An int64 scalar.

    The sum over the ranks does not depend on which rank has which sample, nor on the order of the samples.
    """
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for number, row in zip(counters.hash64_tensor(key, numbers).tolist(), values.detach(), strict=True):
        total += _hash(number & _MASK, row.reshape(-1), 0)
    return total


def _hash(key: int, flat: Tensor, first: int) -> Tensor:
    """Sum over places of mix(bits, place) under a key, int64. flat: (n,), of which the first has the place `first`."""
    bits = flat.contiguous().view(_BITS[flat.element_size()]) if flat.dtype != torch.bool else flat.to(torch.int8)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    first *= len(bits) // max(len(flat), 1)
    for start in range(0, len(bits), _PIECE.get(flat.device.type, _PIECE_ELSEWHERE)):
        piece = bits[start : start + _PIECE.get(flat.device.type, _PIECE_ELSEWHERE)].long()
        place = torch.arange(first + start, first + start + len(piece), dtype=torch.int64, device=flat.device)
        total += counters.hash64_tensor(key, piece + (place << 32)).sum()  # 32 bits each: no two pairs are one number
    return total

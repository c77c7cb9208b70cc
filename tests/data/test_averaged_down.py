"""Batches of coarse levels: averaged down some pictures at a time, never whole in floating point, to the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from sivae_dist.data.augment import Augmentation
from sivae_dist.data.base import SLICE_BYTES, HostBatch
from sivae_dist.engine.progressive import blended
from sivae_dist.engine.storages import Storages

CPU = torch.device("cpu")
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [32, 16, 4])
def test_the_same_bits_as_in_one_piece(layout: torch.memory_format, channels: int, size: int) -> None:
    """With everything that may happen to a picture before, and faded in afterwards."""
    changes = Augmentation(9, mirror=True, shift_px=5, hue=0.5 if channels == 3 else 0.0)
    generator = torch.Generator().manual_seed(3)
    data = torch.randint(0, 256, (7, channels, 32, 32), dtype=torch.uint8, generator=generator)
    data = data.to(memory_format=torch.channels_last)  # as pictures come
    one = channels * 32 * 32 * 4
    for augment in (None, changes.draw(np.arange(7))):
        host = HostBatch(data, torch.arange(7), torch.arange(7) % 3, augment)
        for bounds in ((-1.0, 1.0), (0.0, 1.0)):
            full = host.to(CPU, bounds, memory_format=layout).x
            expected = full if size == 32 else functional.avg_pool2d(full, 32 // size)
            for slice_bytes in (None, 1, one, 3 * one, 7 * one, SLICE_BYTES):
                batch = host.to(CPU, bounds, memory_format=layout, size=size, slice_bytes=slice_bytes)
                assert torch.equal(batch.x, expected) and batch.x.stride() == expected.stride()
                assert torch.equal(batch.position, host.position) and torch.equal(batch.label, host.label)
                assert torch.equal(blended(batch.x, 0.3), blended(expected, 0.3))


def test_empty_batches_and_points() -> None:
    nothing = torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
    assert HostBatch(nothing, torch.arange(0)).to(CPU, None, size=4).x.shape == (0, 3, 4, 4)
    points = torch.rand(5, 2)
    assert torch.equal(HostBatch(points, torch.arange(5)).to(CPU, None, size=1).x, points)


def test_the_whole_batch_is_never_there_in_numbers() -> None:
    host = HostBatch(torch.zeros(256, 3, 64, 64, dtype=torch.uint8), torch.arange(256))
    numbers, peaks = host.data.numel() * 4, []
    for slice_bytes in (None, numbers // 32):
        with Storages() as storages:
            x = host.to(CPU, (-1.0, 1.0), size=4, slice_bytes=slice_bytes).x
            peaks.append(storages.take_peak() - host.data.nbytes)
            del x
    assert peaks[0] > numbers and peaks[1] < numbers / 8

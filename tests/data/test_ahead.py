"""The next batch is fetched ahead, and nothing else changes: neither batches, nor their order, nor what goes wrong."""

from __future__ import annotations

import pytest
import torch

from sivae_dist.data import HostBatch
from sivae_dist.data.ahead import DevicePrefetcher
from sivae_dist.data.faults import Report
from sivae_dist.data.loader import ShardsConfig
from sivae_dist.errors import UserError

CPU = torch.device("cpu")


def batches(packed, **config):
    options = {"workers": 0, "lanes": 8, "window": 4, "shift_px": 2, "hue": 0.1} | config
    return ShardsConfig(url=str(packed), **options).build(seed=5, salt=0, rank=0, ranks=1).batches(0, 6)


def assert_same(one, two) -> None:
    assert len(one.tensors()) == len(two.tensors()) == 5
    assert torch.equal(one.position, two.position)
    for a, b in zip(one.tensors(), two.tensors(), strict=True):
        assert torch.equal(a.cpu(), b.cpu())
    assert one.augment.fill == two.augment.fill
    assert one.report == two.report


@pytest.mark.parametrize("ahead", [True, False])
def test_the_batches_are_the_streams(packed, ahead):
    early, plain = DevicePrefetcher(batches(packed), CPU, early=True), DevicePrefetcher(batches(packed), CPU)
    assert not plain.early
    for expected in [b for b, _ in zip(batches(packed), range(8), strict=False)]:
        assert_same(next(early), expected)
        assert_same(next(plain), expected)
        if ahead:
            early.ahead()
            early.ahead()
            plain.ahead()


class Counted:
    """Three batches, then an error; counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.asked += 1
        if self.asked > 3:
            raise UserError("the disk is gone", "put it back")
        pixels = torch.full((1, 1, 1, 1), self.asked, dtype=torch.uint8)
        return HostBatch(pixels, torch.tensor([self.asked]), report=Report(notes=[str(self.asked)]))


def test_what_fails_ahead_is_raised_in_its_turn():
    source = Counted()
    early = DevicePrefetcher(source, CPU, early=True)
    for number in (1, 2, 3):
        batch = next(early)
        assert batch.position.tolist() == [number]
        assert batch.report.notes == [str(number)]
        early.ahead()
        assert source.asked == number + 1
    with pytest.raises(UserError, match="the disk is gone"):
        next(early)


def test_the_reference_asks_for_nothing_ahead():
    source = Counted()
    plain = DevicePrefetcher(source, CPU)
    next(plain)
    plain.ahead()
    assert source.asked == 1


def test_the_end_of_the_stream_is_the_end(packed):
    source = ShardsConfig(url=str(packed), workers=0, lanes=8).build(seed=5, salt=0, rank=0, ranks=1)
    early = DevicePrefetcher(source.batches(0, 6), CPU, early=True)
    next(early)
    source.close()
    with pytest.raises(StopIteration):
        next(early)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_on_a_device_the_copy_overlaps_and_is_waited_for(packed, workers):
    """Work keeps the device busy while the next batch travels; who reads it without waiting would see stale bytes."""
    device = torch.device("cuda")
    early = DevicePrefetcher(batches(packed, workers=workers), device)
    assert early.early
    busy = torch.randn(2048, 2048, device=device)
    for expected in [b for b, _ in zip(batches(packed), range(30), strict=False)]:
        found = next(early)
        x = found.to(device, (-1.0, 1.0)).x
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        early.ahead()
        assert all(t.is_cuda for t in found.tensors())
        assert not found.position.is_cuda
        assert_same(found, expected)
        assert torch.allclose(x.cpu(), expected.to(CPU, (-1.0, 1.0)).x, atol=1e-5)  # hues are turned there and here

"""Shared memory of batches: never overwritten while someone looks at it, used again afterwards."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from sivae_dist.data.loader import ShardsConfig
from sivae_dist.data.slots import Slots, pool_of


def test_a_slot_is_busy_until_the_last_view_is_gone():
    slots = Slots(workers=2, each=2, size=5000)
    first, second = slots.take(1, 5000), slots.take(1, 10)
    assert first is not None
    assert second is not None
    assert (first.slot, second.slot) == (2, 3)
    assert slots.take(1, 10) is None, "all of this worker's are busy"
    assert slots.take(0, 10) is not None, "the other worker has its own"
    slots.memory(first, 5000)[:] = 9
    slots.memory(second, 10)[:] = 5
    tensor = torch.from_numpy(pool_of(first).lease(first.slot, (50, 100)))
    part = tensor[3].permute(0)
    del tensor
    gc.collect()
    assert slots.busy() == 3
    assert part.eq(9).all()
    del part
    assert slots.busy() == 2
    assert slots.take(1, 10) == first
    slots.give(second)
    assert slots.take(1, 10) == second
    for view in (lambda a: np.asarray(a)[3:], lambda a: torch.from_numpy(a).permute(1, 0)[2:], lambda a: a[1:][1:]):
        part = view(pool_of(first).lease(first.slot, (4, 5), (1, 4)))
        gc.collect()
        assert slots.busy() == 3
        del part
        assert slots.busy() == 2
        slots.take(1, 10)


def test_slots_keep_apart_and_rows_begin_beside_multiples_of_32_bytes():
    """Where libjpeg-turbo would write past the caches. Slots of some large pages begin at one."""
    for size in (100, 5000, (1 << 21) - 16, (1 << 21) + 1):
        slots = Slots(workers=1, each=3, size=size)
        places = [slots.take(0, size) for _ in range(3)]
        for number, place in enumerate(places):
            slots.memory(place, size)[:] = number + 1
            assert slots.address(place.slot) == slots.memory(place, size).ctypes.data
            assert slots.address(place.slot) % 32 == 16
        assert [set(slots.lease(p.slot, (size,)).tolist()) for p in places] == [{1}, {2}, {3}]
        assert slots.busy() == 0


def test_what_does_not_fit_is_refused():
    slots = Slots(workers=1, each=1, size=100)
    assert slots.take(0, 101) is None
    assert slots.take(0, 100) is not None


@pytest.fixture
def source(packed):
    source = ShardsConfig(url=str(packed), lanes=8, window=4, workers=2, prefetch=2).build(
        seed=5, salt=0, rank=0, ranks=1
    )
    yield source
    source.close()


def plain(source, count, size):
    """The same batches without workers, hence without slots."""
    config = ShardsConfig(url=source.config.url, lanes=8, window=4, workers=0)
    batches = config.build(seed=5, salt=0, rank=0, ranks=1).batches(0, size)
    return [next(batches) for _ in range(count)]


@pytest.mark.dist
def test_batches_that_are_kept_stay_as_they_were(source):
    """Someone who keeps all batches exhausts the slots; those that are dropped are used again."""
    served = source.batches(0, 6)
    slots = served._pictures.slots
    kept = [next(served) for _ in range(20)]
    assert slots.busy() == 2 * slots.each
    expected = plain(source, 60, 6)
    for found, right in zip(kept, expected, strict=False):
        assert torch.equal(found.data, right.data)
    del kept, found
    for right in expected[20:]:
        found = next(served)
        assert torch.equal(found.data, right.data)
        assert torch.equal(found.label, right.label)
        assert torch.equal(found.augment.mirror, right.augment.mirror)
        assert found.position.tolist() == right.position.tolist()
    assert slots.busy() < 2 * slots.each


@pytest.mark.dist
def test_a_batch_larger_than_a_slot_goes_the_plain_way(source):
    """Batches may grow during a run; the slots have the size of the first."""
    served = source.batches(0, lambda start: 2 if start < 4 else 10)
    found = [next(served) for _ in range(6)]
    assert [len(b.position) for b in found] == [2, 2, 10, 10, 10, 10]
    right = plain(source, 1, 44)[0]
    np.testing.assert_array_equal(torch.cat([b.data for b in found]).numpy(), right.data.numpy())


@pytest.mark.dist
def test_the_layout_is_the_models(source):
    batch = next(source.batches(0, 6))
    assert batch.data.is_contiguous(memory_format=torch.channels_last)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = batch.to(torch.device("cpu"), (-1.0, 1.0), memory_format=layout).x
        assert x.is_contiguous(memory_format=layout)
        mirrored = torch.where(batch.augment.mirror.view(-1, 1, 1, 1), batch.data.flip(-1), batch.data)
        assert torch.equal(x, mirrored.contiguous().float().mul_(2 / 255).add_(-1))

"""What is computed for many batches together is what each of them would get alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sivae_dist.data.augment import Augmentation
from sivae_dist.data.parts import Parts, Reads, in_shard_order, listed, planned
from sivae_dist.data.plan import Plan
from sivae_dist.data.shard_read import ShardReader, load_manifest
from sivae_dist.data.store import FolderStore


def growing(start: int) -> int:
    return 3 + start % 7


@pytest.mark.parametrize("size", [6, 5000, growing])
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (2, 3), (6, 7)])
def test_batches_are_as_if_made_alone(size, rank, ranks):
    plan = Plan([9, 0, 17, 30], lanes=7, window=4, seed=3)
    augmentation = Augmentation(5, mirror=True, shift_px=3, hue=0.2)
    parts = Parts(planned(plan, 40, size, rank, ranks), plan.locate, augmentation)
    start, whole = 40, isinstance(size, int)
    for packed in itertools.islice(parts, 3 if size == 5000 else 200):
        reads = Reads.unpacked(packed)
        count = size if whole else size(start)
        mine = plan.owned(start, count, rank, ranks)
        shard, number = Plan([9, 0, 17, 30], lanes=7, window=4, seed=3).locate(mine)
        part, drawn = parts.waiting.popleft(), augmentation.draw(mine)
        assert part.position.tolist() == mine.tolist()
        for found, expected in zip(
            (part.augment.mirror, part.augment.shift, part.augment.hue),
            (drawn.mirror, drawn.shift, drawn.hue),
            strict=True,
        ):
            assert torch.equal(found, expected)
        order = np.lexsort((number, shard))
        assert reads.place == order.tolist()
        assert (reads.position, reads.shard, reads.number) == tuple(a[order].tolist() for a in (mine, shard, number))
        start += count


def test_listed_samples_are_found_in_shard_order(packed):
    shards = load_manifest(FolderStore(packed)).of("train")
    every = [(s, n) for s, shard in enumerate(shards) for n in range(shard.count)]
    parts = Parts(listed(range(0, len(every), 3), 4), in_shard_order(shards), None)
    found = [(s, n) for reads in map(Reads.unpacked, parts) for s, n in zip(reads.shard, reads.number, strict=True)]
    assert found == every[::3]
    assert parts.waiting[0].position.tolist() == [0, 3, 6, 9]


def test_several_at_a_time_are_those_one_by_one(packed):
    manifest = load_manifest(FolderStore(packed))
    reader, truth = (ShardReader(FolderStore(packed), manifest, manifest.shards) for _ in range(2))
    places = [(s, n) for s, shard in enumerate(manifest.shards) for n in range(shard.count)]
    shards, numbers = [s for s, _ in places], [n for _, n in places]
    expected = [truth.encoded(*place)[1:] for place in places]
    assert reader.several(shards, numbers, 1 << 30) == expected
    some = reader.several(shards, numbers, len(expected[0][0]) + 1)
    assert some == expected[:2], "no more than were asked for, and what is begun is read"

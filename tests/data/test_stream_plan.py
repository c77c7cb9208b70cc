"""Properties of the stream plan, for any shard sizes, lanes, windows, ranks and batches."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sivae_dist.data.plan import Plan
from sivae_dist.errors import UserError

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda c: sum(c) > 0)
LANES = st.integers(1, 20)
WINDOW = st.integers(1, 50)
SEED = st.integers(0, 2**32)


def whole_epoch(plan: Plan, epoch: int = 0) -> list[tuple[int, int]]:
    n = plan.epoch_size
    shard, index = plan.locate(np.arange(epoch * n, (epoch + 1) * n))
    return list(zip(shard.tolist(), index.tolist(), strict=True))


def every_sample(counts: list[int]) -> list[tuple[int, int]]:
    return [(s, i) for s, count in enumerate(counts) for i in range(count)]


@given(COUNTS, LANES, WINDOW, SEED, st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_an_epoch_serves_each_sample_once(counts, lanes, window, seed, epoch):
    plan = Plan(counts, lanes=lanes, window=window, seed=seed)
    assert sorted(whole_epoch(plan, epoch)) == every_sample(counts)


@given(COUNTS, LANES, WINDOW, st.integers(1, 7), st.integers(1, 30), st.integers(0, 500))
@settings(max_examples=100, deadline=None)
def test_ranks_partition_every_batch_and_do_not_change_the_order(counts, lanes, window, ranks, batch, start):
    plan = Plan(counts, lanes=lanes, window=window, seed=3)
    expected = np.arange(start, start + batch)
    parts = [plan.owned(start, batch, rank, ranks) for rank in range(ranks)]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), expected)
    for rank, part in enumerate(parts):
        assert (part % lanes % ranks == rank).all()
        one_by_one = [plan.locate(np.array([p])) for p in part]
        together = plan.locate(part)
        assert [int(s[0]) for s, _ in one_by_one] == together[0].tolist()
        assert [int(i[0]) for _, i in one_by_one] == together[1].tolist()


@given(COUNTS, st.integers(1, 7), st.integers(1, 6), st.integers(1, 90), st.integers(0, 500))
@settings(max_examples=100, deadline=None)
def test_parts_differ_by_one_at_most_wherever_epochs_end(counts, ranks, times, batch, start):
    plan = Plan(counts, lanes=ranks * times, window=5)
    parts = [len(plan.owned(start, batch, rank, ranks)) for rank in range(ranks)]
    assert sum(parts) == batch
    assert max(parts) - min(parts) <= 1


@given(COUNTS, LANES, WINDOW, st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_resuming_anywhere_gives_the_same_tail(counts, lanes, window, start):
    long = Plan(counts, lanes=lanes, window=window, seed=11).locate(np.arange(start + 60))
    tail = Plan(counts, lanes=lanes, window=window, seed=11).locate(np.arange(start, start + 60))
    np.testing.assert_array_equal(long[0][start:], tail[0])
    np.testing.assert_array_equal(long[1][start:], tail[1])


@given(COUNTS, LANES, WINDOW)
@settings(max_examples=60, deadline=None)
def test_lanes_are_contiguous_runs_of_the_shard_sequence(counts, lanes, window):
    plan = Plan(counts, lanes=lanes, window=window, seed=5)
    n = plan.epoch_size
    sizes = plan.lane_sizes()
    assert sizes.sum() == n
    assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)
    assert sizes.max() - sizes.min() <= 1
    # The shard sequence is recovered from the lanes: every lane's samples must be consecutive in some order of shards.
    shard, index = plan.locate(np.arange(n))
    tables = plan._epoch(0)
    place = np.argsort(tables.order)  # shard -> place in the sequence
    sequence = tables.first[place[shard]] + index
    starts = []
    for lane in range(min(lanes, n)):
        run = sequence[lane::lanes]
        assert len(run) == sizes[lane]
        assert sorted(run.tolist()) == list(range(run.min(), run.min() + len(run)))
        starts.append(int(run.min()))
        # Reads are local: a sample is at most two windows from where it would stand unshuffled.
        assert np.abs(run - run.min() - np.arange(len(run))).max() < plan.window
    assert len(set(starts)) == len(starts)


def test_the_order_changes_with_epoch_seed_and_salt():
    counts = [30, 50, 7]
    base = Plan(counts, lanes=4, window=16, seed=1)
    assert whole_epoch(base, 0) != whole_epoch(base, 1)
    assert whole_epoch(base) != whole_epoch(Plan(counts, lanes=4, window=16, seed=2))
    assert whole_epoch(base) != whole_epoch(Plan(counts, lanes=4, window=16, seed=1, salt=1))
    assert whole_epoch(base) == whole_epoch(Plan(counts, lanes=4, window=16, seed=1))


def test_the_order_is_the_same_for_ever():
    """A run written by this version must resume under a later one: these numbers may never change."""
    shard, index = Plan([3, 0, 5, 4], lanes=4, window=2, seed=7).locate(np.arange(24))
    assert list(zip(shard.tolist(), index.tolist(), strict=True)) == GOLDEN


# fmt: off
GOLDEN = [
    (2, 0), (3, 1), (0, 1), (2, 4), (2, 2), (3, 3), (0, 2), (2, 3), (2, 1), (3, 2), (3, 0), (0, 0),
    (3, 2), (2, 3), (0, 1), (2, 0), (3, 1), (0, 0), (0, 2), (2, 2), (3, 3), (2, 4), (3, 0), (2, 1),
]
# fmt: on


def test_a_set_smaller_than_the_lanes_is_fully_shuffled():
    """Each of 6 samples of one shard comes first in some epoch, and the orders look independent."""
    plan = Plan([6], lanes=128, seed=4)
    orders = [tuple(i for _, i in whole_epoch(plan, e)) for e in range(300)]
    assert len(set(orders)) > 200  # of 720 possible; 300 uniform draws give about 245
    first = np.bincount([o[0] for o in orders], minlength=6)
    assert first.min() > 25


def test_a_window_is_shuffled_uniformly():
    """Every sample of a lane of one window is equally likely at every step."""
    plan = Plan([8], lanes=1, window=8, seed=0)
    table = np.zeros((8, 8))
    for epoch in range(800):
        for step, (_, index) in enumerate(whole_epoch(plan, epoch)):
            table[step, index] += 1
    chi2 = ((table - 100) ** 2 / 100).sum()
    assert chi2 < 100  # 49 degrees of freedom: mean 49, and 100 lies more than five standard deviations above


def test_window_borders_move_between_epochs():
    plan = Plan([64], lanes=1, window=16, seed=0)
    phases = {int(plan._epoch(epoch).phase[0]) for epoch in range(40)}
    assert len(phases) > 8


def test_a_large_epoch_is_cheap_and_holds_little():
    counts = np.full(3000, 1000)
    begin = time.perf_counter()
    plan = Plan(counts, seed=1)
    rng = np.random.default_rng(0)
    for epoch in range(10):
        plan.locate(epoch * plan.epoch_size + rng.integers(0, plan.epoch_size, 64))
    print(f"10 epochs of 3M samples entered in {time.perf_counter() - begin:.3f} s")
    assert len(plan._cache) <= 4
    shard, index = plan.locate(np.arange(1_000_000, 1_200_000))
    assert len(np.unique(shard * 1000 + index)) == 200_000


def test_one_window_larger_than_the_data_and_chunks_of_windows(monkeypatch):
    counts = [100, 41]
    whole = whole_epoch(Plan(counts, lanes=3, window=10, seed=2))
    monkeypatch.setattr("sivae_dist.data.plan._CELLS_AT_ONCE", 25)
    assert whole_epoch(Plan(counts, lanes=3, window=10, seed=2)) == whole
    assert sorted(whole_epoch(Plan(counts, lanes=3, window=1 << 20, seed=2))) == every_sample(counts)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"counts": [0, 0]}, "no sample"),
        ({"counts": []}, "no sample"),
        ({"counts": [5, -1]}, "-1 samples"),
        ({"counts": [5], "lanes": 0}, "data.lanes is 0"),
        ({"counts": [5], "window": 0}, "data.window is 0"),
    ],
)
def test_bad_plans_are_refused(arguments, text):
    with pytest.raises(UserError, match=text):
        Plan(**arguments)


def test_negative_positions_are_refused():
    with pytest.raises(ValueError, match="negative"):
        Plan([5]).locate(np.array([-1]))


@given(COUNTS, LANES, WINDOW, st.integers(0, 200))
@settings(max_examples=40, deadline=None)
def test_windows_that_are_kept_are_those_computed_anew(counts, lanes, window, start):
    """Also with room for hardly any, so that they come and go."""
    positions = np.arange(start, start + 90)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sivae_dist.data.plan._FEW", 0)
        anew = Plan(counts, lanes=lanes, window=window, seed=9).locate(positions)
    for cells in (1 << 19, 3 * window):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sivae_dist.data.plan._CELLS_KEPT", cells)
            plan = Plan(counts, lanes=lanes, window=window, seed=9)
            for begin in range(0, 90, 3):
                kept = plan.locate(positions[begin : begin + 3])
                np.testing.assert_array_equal(kept[0], anew[0][begin : begin + 3])
                np.testing.assert_array_equal(kept[1], anew[1][begin : begin + 3])
            assert all(len(e.orders) * plan.window <= cells for e in plan._cache.values())

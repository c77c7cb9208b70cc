"""Which sample when: index arithmetic from a position in the stream to (shard, index in the shard), without any I/O.

Position P of the stream belongs to lane P % L, over all epochs, so that any run of positions is spread over the lanes
as evenly as can be. An epoch has N samples. It permutes the shards, lays their samples end to end, and cuts that
sequence into L contiguous runs, one a lane. Lanes take their turns from the epoch's first position on: position p of
the epoch is the (p // L)-th sample of the lane whose turn is p % L; turns below N % L have N // L + 1 samples, the
others N // L. Which run belongs to which turn is permuted too, and a run is read through windows that are shuffled one
by one. So reads stay local, everything is random access, and nothing depends on ranks, workers or batch. Tables of an
epoch go by turns: which lane it begins with does not change what is served when.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sivae_dist.counters import hash64, key, permutation
from sivae_dist.errors import UserError

Int64 = npt.NDArray[np.int64]

_EPOCHS_KEPT = 4  # a batch straddles two epochs; prefetching workers may be a little apart
_CELLS_AT_ONCE = 1 << 21  # bounds the memory of the window shuffle when very many positions are asked for together
_FEW = 1024  # positions that are looked up window by window, as the batches of a rank are
_CELLS_KEPT = 1 << 19  # numbers of 4 bytes: windows are asked for again and again until they are used up
_INVALID = np.uint64(0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True)
class _Epoch:
    """Tables of one epoch: O(shards + lanes)."""

    order: Int64  # (S,) shard at each place of the sequence
    first: Int64  # (S+1,) sequence number of the first sample at each place
    start: Int64  # (L,) by turn: sequence number where the run begins
    phase: Int64  # (L,) how far into its first window it begins
    window_key: int
    orders: OrderedDict[int, tuple[npt.NDArray[np.int32], int]]  # of windows asked for lately: as `_window_orders`


class Plan:
    """The order in which the samples of a set of shards are served, for ever.

    counts: samples per shard, zeros allowed.
    lanes:  number of independent readers L; fixed for the life of a run. Ranks own whole lanes.
    window: samples shuffled together within a lane; reads of a lane stay inside one window.
    seed, salt: key all permutations; another salt gives another order for the same positions.
    """

    def __init__(
        self, counts: Sequence[int] | Int64, *, lanes: int = 128, window: int = 256, seed: int = 0, salt: int = 0
    ) -> None:
        self.counts: Int64 = np.asarray(counts, dtype=np.int64).reshape(-1)
        self.epoch_size = int(self.counts.sum())
        if self.epoch_size == 0:
            raise UserError(
                "the data hold no sample: every shard is empty", "choose another split or pack the data again"
            )
        if (self.counts < 0).any():
            raise UserError(f"a shard has {int(self.counts.min())} samples", "verify the shard folder")
        if lanes < 1:
            raise UserError(f"data.lanes is {lanes}, expected 1 or more", "leave it at its default of 128")
        if not 1 <= window <= 1 << 20:
            raise UserError(f"data.window is {window}, expected 1 to {1 << 20}", "leave it at its default of 256")
        self.lanes, self.seed, self.salt = lanes, seed, salt
        self._base, self._longer = divmod(self.epoch_size, lanes)
        longest = self._base + (self._longer > 0)
        self.window = min(window, longest)
        self._slots = (-(-longest // self.window) + 1) * self.window  # per lane, with room for the phase
        self._cache: OrderedDict[int, _Epoch] = OrderedDict()

    @property
    def at_once(self) -> int:
        """As many positions `locate` finds by windows that it keeps; more at a time have them computed anew."""
        return min(_FEW, max(1, _CELLS_KEPT // self.window))

    def lane_sizes(self) -> Int64:
        """Samples of an epoch by turn, (L,), the longer ones first; the lanes of the first epoch are in this order."""
        return self._base + (np.arange(self.lanes) < self._longer).astype(np.int64)

    def owned(self, start: int, size: int, rank: int, ranks: int) -> Int64:
        """The positions in [start, start + size) whose lane belongs to `rank` (lane % ranks == rank), ascending."""
        mine: Int64 = start + np.flatnonzero(self.owners(start, size, ranks) == rank)
        return mine

    def owners(self, start: int, size: int, ranks: int) -> Int64:
        """The rank that serves each of the positions [start, start + size), (size,).

        Where the lanes are a multiple of the ranks, the ranks' parts differ by one at most, wherever epochs end.
        """
        owner: Int64 = np.arange(start, start + size, dtype=np.int64) % self.lanes % ranks
        return owner

    def shards_at_once(self, ranks: int) -> int:
        """Shards that a rank's lanes read by turns: who keeps so many indices reads each once while a lane is in it.

        Between two uses of a shard within a lane's window, every other lane is in two windows at most. Where shards are
        equally large, so many samples lie in 1 + ceil(2 * window / samples of a shard) shards at most; on average they
        lie in fewer, but lanes may come to the ends of their shards all together.
        """
        filled = int(np.count_nonzero(self.counts))
        lanes = -(-self.lanes // ranks)
        return min(filled, lanes * (1 + math.ceil(2 * self.window * filled / self.epoch_size)))

    def locate(self, positions: Int64) -> tuple[Int64, Int64]:
        """Stream positions (B,), in any order, of any epochs -> shard (B,) and index in that shard (B,)."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"negative stream position {positions.min()}")
        epochs, within = np.divmod(positions, self.epoch_size)
        shard, index = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            shard[here], index[here] = self._locate_epoch(self._epoch(epoch), within[here])
        return shard, index

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch in self._cache:
            self._cache.move_to_end(epoch)
            return self._cache[epoch]
        purpose = ("plan", self.salt, epoch)
        order = permutation(key(self.seed, *purpose, "shards"), len(self.counts))
        first = np.concatenate([[0], np.cumsum(self.counts[order])])
        # The runs lie in the sequence in the order `runs`; a run's length goes with its lane, so that position -> lane
        # stays p % L, while its place changes every epoch. Without this a set with N <= L would never be shuffled
        # below the level of shards.
        runs = permutation(key(self.seed, *purpose, "runs"), self.lanes)
        sizes = self.lane_sizes()
        start = np.empty(self.lanes, dtype=np.int64)
        start[runs] = np.cumsum(sizes[runs]) - sizes[runs]
        # A random phase moves the window borders from epoch to epoch. A lane that fits one window keeps it whole.
        draws = hash64(key(self.seed, *purpose, "phase"), np.arange(self.lanes, dtype=np.uint64))
        phase = np.where(sizes > self.window, (draws % np.uint64(self.window)).astype(np.int64), 0)
        tables = _Epoch(order, first, start, phase, key(self.seed, *purpose, "window"), OrderedDict())
        self._cache[epoch] = tables
        while len(self._cache) > _EPOCHS_KEPT:
            self._cache.popitem(last=False)
        return tables

    def _locate_epoch(self, tables: _Epoch, within: Int64) -> tuple[Int64, Int64]:
        step, lane = np.divmod(within, self.lanes)
        sequence = tables.start[lane] + self._shuffled(tables, lane, step)
        place = np.searchsorted(tables.first, sequence, side="right") - 1  # "right" steps over empty shards
        return tables.order[place], sequence - tables.first[place]

    def _shuffled(self, tables: _Epoch, lane: Int64, step: Int64) -> Int64:
        """Which sample of its lane's run is served at each step: the window shuffle, windows being computed whole.

        A window's order is the order of the hashes of its slots, which is a uniform permutation. The first and the last
        window of a lane are partial; their missing slots sort to the end.
        """
        slot = step + tables.phase[lane]
        numbers = (lane * self._slots + slot) // self.window
        if len(step) <= self.at_once:
            offset = slot % self.window
            return step + self._from_kept(tables, numbers, offset) - offset
        windows, which = np.unique(numbers, return_inverse=True)
        result = np.empty_like(step)
        chunk = max(1, _CELLS_AT_ONCE // self.window)
        by_window = np.argsort(which, kind="stable")
        borders = np.searchsorted(which[by_window], np.arange(0, len(windows) + chunk, chunk))
        for number, begin in enumerate(range(0, len(windows), chunk)):
            picked = by_window[borders[number] : borders[number + 1]]
            order, low = self._window_orders(tables, windows[begin : begin + chunk])
            row = which[picked] - begin
            offset = slot[picked] % self.window
            chosen = order[row, offset - low[row]]
            result[picked] = step[picked] + chosen - offset
        return result

    def _from_kept(self, tables: _Epoch, windows: Int64, offsets: Int64) -> Int64:
        """Which slot of its window is served at each offset; the windows' orders are kept for the next time."""
        kept = tables.orders
        if missing := list(dict.fromkeys(w for w in windows.tolist() if w not in kept)):
            orders, lows = self._window_orders(tables, np.array(missing, dtype=np.int64))
            kept.update(zip(missing, zip(orders.astype(np.int32), lows.tolist(), strict=True), strict=True))
        chosen = np.empty_like(offsets)
        for place, (window, offset) in enumerate(zip(windows.tolist(), offsets.tolist(), strict=True)):
            order, low = kept[window]
            chosen[place] = order[offset - low]
            kept.move_to_end(window)
        while len(kept) * self.window > _CELLS_KEPT:
            kept.popitem(last=False)
        return chosen

    def _window_orders(self, tables: _Epoch, windows: Int64) -> tuple[Int64, Int64]:
        """For each window its slots in the order they are served, (G, window), and its first valid slot, (G,)."""
        numbers = windows[:, None] * self.window + np.arange(self.window)
        lane = windows * self.window // self._slots
        begin = windows * self.window - lane * self._slots  # the window's first slot within its lane
        low = np.maximum(tables.phase[lane] - begin, 0)
        high = tables.phase[lane] + self._base + (lane < self._longer) - begin
        slots = np.arange(self.window)
        valid = (slots >= low[:, None]) & (slots < high[:, None])
        ranking = np.where(valid, hash64(tables.window_key, numbers.astype(np.uint64)) >> np.uint64(1), _INVALID)
        return np.argsort(ranking, axis=1, kind="stable"), low

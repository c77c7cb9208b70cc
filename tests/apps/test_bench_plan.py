"""`bench plan`: the plan of a large set, simulated. The slow tests are the promises at full size."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sivae_dist.apps.bench import plan as bench
from sivae_dist.cli import main
from sivae_dist.data.plan import Plan
from sivae_dist.data.shard_read import ShardReader

SMALL = bench.Size(samples=5003, shards=13, ranks=8, lanes=16, window=32, batch=64)


def test_the_made_up_folder_is_believed() -> None:
    """Manifest and indices pass all checks of the readers."""
    store = bench.MadeUpStore(SMALL)
    manifest = bench.Manifest.from_bytes(store.manifest, "here")
    reader = ShardReader(store, manifest, manifest.shards)
    assert sum(len(reader.index(shard).keys) for shard in range(13)) == 5003


def test_promises_of_a_small_set() -> None:
    assert bench.promises(SMALL, changes=(8, 6, 16)) == {
        "lost_or_doubled": 0,
        "uneven": 0,
        "uneven_straddling": 0,
        "changes_lost": 0,
    }


def test_broken_promises_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    good = Plan._shuffled

    def bad(self, tables, lane, step):
        return good(self, tables, lane, np.minimum(step, 300))

    monkeypatch.setattr(Plan, "_shuffled", bad)
    found = bench.promises(SMALL)
    assert found["lost_or_doubled"] > 0
    assert found["changes_lost"] > 0


def test_a_full_shuffle_measures_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    order = np.random.default_rng(0).permutation(SMALL.samples)
    monkeypatch.setattr(bench, "served", lambda plan: order)
    found = bench.mixing(SMALL, 16, 32)
    assert abs(found["correlation"]) < 0.05
    for name in ("neighbours", "spread", "shard_span", "same_shard"):
        assert found[name] == pytest.approx(1, abs=0.05), name
    assert 1 <= found["run"] < 1.02


def test_no_shuffle_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "served", lambda plan: np.arange(SMALL.samples))
    found = bench.mixing(SMALL, 16, 32)
    assert found["correlation"] == pytest.approx(1)
    assert found["neighbours"] < 0.001
    assert found["shard_span"] < 0.1
    assert found["run"] > 50


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CHOICES", ((16, 8), (32, 64)))
    common = ["--samples", "2000", "--shards", "10", "--ranks", "8", "--lanes", "16", "--batch", "64", "--tables"]
    main(["bench", "plan", *common, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [row["lanes"] for row in found["mixing"]] == [16, 32]
    costs = found["costs"]
    assert costs["rank_mb"] > costs["manifest_mb"] > 0, "the training process holds the plan"
    assert costs["worker_mb"] == pytest.approx(costs["manifest_mb"] + costs["indices_mb"])
    main(["bench", "plan", *common])
    assert "lost_or_doubled" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["bench", "plan", "--ranks", "8", "--lanes", "4"])
    assert "fewer than the 8 ranks" in capsys.readouterr().err


@pytest.mark.slow
def test_promises_at_full_size() -> None:
    """3 million samples in 3,000 shards, 1,024 ranks, and 8, 6, then 16 ranks within an epoch."""
    found = bench.promises(bench.Size())
    assert found == {"lost_or_doubled": 0, "uneven": 0, "uneven_straddling": 0, "changes_lost": 0}
    odd = bench.promises(bench.Size(batch=5000))
    assert odd["uneven"] <= 1
    assert odd["uneven_straddling"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("size", [bench.Size(), bench.Size(ranks=1, lanes=128, batch=256)], ids=["1024", "1"])
def test_ranks_and_workers_hold_little_at_full_size(size: bench.Size) -> None:
    found = bench.costs(size)
    assert found["worker_mb"] < 100
    assert found["rank_mb"] < 100
    assert found["peak_mb"] < 100

"""The shard stream: exactly the plan, for any ranks and workers, from any position, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from drawn import draw_folder
from processes import children, gone

from sivae_dist.counters import coin, key
from sivae_dist.data import device_decode
from sivae_dist.data.base import DataConfig
from sivae_dist.data.loader import ShardsConfig
from sivae_dist.data.pack import pack
from sivae_dist.data.pack_shard import PackOptions
from sivae_dist.data.shard_read import ShardReader
from sivae_dist.data.sources.folder import FolderSource
from sivae_dist.data.store import FolderStore
from sivae_dist.devices import cuda_used
from sivae_dist.errors import UserError
from sivae_dist.registry import component


def stream(folder, *, seed=5, salt=0, rank=0, ranks=1, **config):
    options = {"workers": 0, "lanes": 8, "window": 4} | config
    return ShardsConfig(url=str(folder), **options).build(seed=seed, salt=salt, rank=rank, ranks=ranks)


def served(folder, *, start=0, size=6, batches=10, ranks=1, **config):
    """{position: (mirror, label, picture)} over all ranks."""
    found = {}
    for rank in range(ranks):
        source = stream(folder, rank=rank, ranks=ranks, **config)
        iterator = source.batches(start, size)
        for number in range(batches):
            batch = next(iterator)
            low = start + number * size
            for i, position in enumerate(batch.position.tolist()):
                assert low <= position < low + size
                assert position not in found
                label = None if batch.label is None else int(batch.label[i])
                found[position] = (bool(batch.augment.mirror[i]), label, batch.data[i].numpy().tobytes())
        source.close()
    return found


@pytest.fixture(scope="module")
def one_shard(tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    pack(FolderSource(draw_folder(root / "raw", 30)), root / "shards", PackOptions(16, format="png"), progress=False)
    return root / "shards"


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_ranks_and_workers_do_not_change_what_is_served(packed, ranks, workers):
    expected = served(packed, batches=13)
    assert list(expected) == list(range(78))
    assert served(packed, batches=13, ranks=ranks, workers=workers) == dict(sorted(expected.items()))
    epochs = [{expected[p][2] for p in range(e * 36, e * 36 + 36)} for e in (0, 1)]
    assert epochs[0] == epochs[1]
    assert len(epochs[0]) == 36, "every picture exactly once an epoch"


@pytest.mark.dist
@pytest.mark.parametrize(("workers", "prefetch", "size"), [(1, 1, 1), (2, 1, 17), (3, 7, 5), (5, 2, 40)])
def test_workers_change_nothing_however_far_ahead_they_are(packed, workers, prefetch, size):
    options = {"size": size, "batches": 12, "shift_px": 2, "hue": 0.1}
    assert served(packed, workers=workers, prefetch=prefetch, **options) == served(packed, **options)


def test_one_shard_serves_many_ranks(one_shard):
    found = served(one_shard, ranks=5, workers=2, size=10, batches=3)
    assert len({picture for _, _, picture in found.values()}) == 30
    assert all(label is None for _, label, _ in found.values())


@pytest.mark.parametrize("start", [1, 35, 36, 50, 1_000_000_007])
def test_it_resumes_anywhere_on_another_number_of_ranks(packed, start):
    whole = served(packed, start=start, size=40, batches=1)
    assert served(packed, start=start, size=8, batches=5, ranks=3, workers=2) == whole
    if start < 100:
        before = served(packed, size=1, batches=start + 40)
        assert {p: v for p, v in before.items() if p >= start} == whole


def test_batches_hold_what_the_plan_says(packed):
    source = stream(packed, workers=2)
    batch = next(source.batches(30, 10))
    assert batch.data.dtype == torch.uint8
    assert batch.data.shape == (10, 3, 16, 16)
    assert batch.position.tolist() == list(range(30, 40))
    assert batch.augment.mirror.tolist() == coin(key(5, "mirror"), np.arange(30, 40)).tolist()
    shard, number = source.plan.locate(np.arange(30, 40))
    pictures, labels = [], []
    reader = ShardReader(FolderStore(packed), source.manifest, source.manifest.of("train"))
    for s, n in zip(shard.tolist(), number.tolist(), strict=True):
        read = reader.read(s, n)
        pictures.append(read.image)
        labels.append(read.label)
        assert read.label == int(read.key[5])
    np.testing.assert_array_equal(batch.data.numpy(), np.stack(pictures))
    assert batch.label.tolist() == labels
    assert (source.epoch_size, source.classes, source.sample_shape) == (36, 3, (3, 16, 16))
    assert len(source.fingerprint) == 64
    source.close()


def test_salt_and_seed_change_the_order_and_mirror_can_be_switched_off(packed):
    base = [p for _, _, p in served(packed, batches=6).values()]
    assert [p for _, _, p in served(packed, batches=6, salt=1).values()] != base
    assert [p for _, _, p in served(packed, batches=6, seed=6).values()] != base
    assert next(stream(packed, mirror=False).batches(0, 4)).augment.mirror is None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_without_samples_gets_empty_batches(packed, workers):
    source = stream(packed, rank=7, ranks=8, workers=workers)
    batches = source.batches(0, 4)
    assert [len(next(batches).position) for _ in range(4)] == [0, 1, 0, 1]
    batches = source.batches(0, 4)
    empty = next(batches)
    assert empty.data.shape == (0, 3, 16, 16)
    assert empty.augment.mirror.shape == empty.label.shape == (0,)
    assert len(empty.to(torch.device("cpu"), (0.0, 1.0))) == 0
    source.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_held_out_is_shared_by_the_ranks(packed, workers):
    for limit, expected in ((3, [0, 1, 2]), (100, [0, 1, 2, 3, 4]), (0, [])):
        positions, pictures = [], set()
        for rank in range(2):
            source = stream(packed, rank=rank, ranks=2, workers=workers)
            for batch in source.held_out(limit, batch=2):
                assert batch.augment is None
                assert batch.label is not None
                positions += batch.position.tolist()
                pictures |= {x.numpy().tobytes() for x in batch.data}
            source.close()
        assert sorted(positions) == expected
        assert len(pictures) == len(expected)
    trained = {p for _, _, p in served(packed, batches=6).values()}
    assert not trained & pictures


def test_without_a_validation_split_training_pictures_stand_in(packed, one_shard):
    source = stream(one_shard)
    assert source.held_out_split == "train"
    batches = source.held_out(10, batch=4)
    assert [b.position.tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert stream(packed).held_out_split == "val"


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"split": "test"}, "data.split is 'test', .* has train, val"),
        ({"ranks": 9}, "data.lanes is 8, fewer than the 9 ranks"),
        ({"workers": -1}, "data.workers is -1"),
        ({"prefetch": 0}, "data.prefetch is 0"),
        ({"window": 0}, "data.window is 0"),
    ],
)
def test_bad_settings_are_refused(packed, config, text):
    with pytest.raises(UserError, match=text):
        stream(packed, **config)


def test_it_is_found_by_name():
    assert component("sivae_dist.data", DataConfig, "shards", kind="data") is ShardsConfig


@pytest.mark.dist
def test_close_ends_the_workers(packed):
    before = children()
    source = stream(packed, workers=2)
    batches = source.batches(0, 4)
    next(batches)
    started = children() - before
    assert len(started) == 2
    source.close()
    assert gone(started)
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.dist
def test_a_killed_worker_is_an_error_and_no_hang(packed):
    before = children()
    source = stream(packed, workers=2)
    batches = source.batches(0, 4)
    next(batches)
    for pid in children() - before:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(UserError, match="a data worker process was killed"):
        for _ in range(50):
            next(batches)


def test_a_killed_worker_does_not_interrupt_other_work(packed):
    """The next batch that is waited for tells it, not whatever runs when they die."""
    before = children()
    source = stream(packed, workers=2)
    batches = source.batches(0, 4)
    next(batches)
    for pid in children() - before:
        os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + 1.0
    while time.monotonic() < until:  # a step
        sum(range(1000))
    with pytest.raises(UserError, match="a data worker process was killed"):
        next(batches)
    again = source.batches(0, 4)  # nothing of it is left over
    assert next(again).position.tolist() == [0, 1, 2, 3]
    source.close()


@pytest.mark.dist
def test_workers_live_through_signals_to_the_group(packed):
    before = children()
    source = stream(packed, workers=2)
    batches = source.batches(0, 4)
    next(batches)
    next(batches)  # batches come from the workers in turn: both have started now
    for pid in children() - before:
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, number)
        stranger = f"import os, signal; os.kill({pid}, signal.SIGTERM)"
        subprocess.run([sys.executable, "-c", stranger], check=True)
    time.sleep(0.7)
    assert len(children() - before) == 2
    for _ in range(30):
        next(batches)
    source.close()


HOLDER = """
import sys, time
from pathlib import Path
from sivae_dist.data.loader import ShardsConfig
batches = ShardsConfig(url=sys.argv[1], workers=2).build(seed=0, salt=0, rank=0, ranks=1).batches(0, 4)
next(batches)
import os
print(Path(f"/proc/self/task/{os.getpid()}/children").read_text(), flush=True)
time.sleep(600)
"""


@pytest.mark.dist
def test_workers_die_with_a_killed_parent(packed):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(packed)], stdout=subprocess.PIPE, text=True)
    workers = [int(p) for p in process.stdout.readline().split()]
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert gone(workers)


@pytest.mark.parametrize("said", ["true", "on"])
def test_training_on_cpus_beside_a_gpu_locks_no_pages(packed, monkeypatch, said):
    """Locking them makes a context on the device. (Without a CUDA build it fails, which shows that it is tried.)"""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert cuda_used()
    monkeypatch.setenv("ACCELERATE_USE_CPU", said)
    assert not cuda_used()
    batch = next(stream(packed).batches(0, 6))
    assert not any(tensor.is_pinned() for tensor in (*batch.tensors(), batch.position))
    assert device_decode.unusable() == "ACCELERATE_USE_CPU is set"

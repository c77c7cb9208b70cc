"""A change of level leaks no memory, keeps nothing of the level before, and starts no process."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_growing import growing

import sivae_dist
from sivae_dist import counters
from sivae_dist.data import HostBatch
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.engine.config import from_dict
from sivae_dist.engine.ema import Ema
from sivae_dist.engine.growing import Growing
from sivae_dist.engine.iteration import Iteration
from sivae_dist.engine.optim import OptimConfig, PlayerOptim
from sivae_dist.engine.progressive import GrowthConfig
from sivae_dist.engine.storages import Storages
from sivae_dist.models.style import StyleConfig
from sivae_dist.objectives.soft_introvae import SoftIntroVaeConfig

LEVEL, FADE = 40, 20  # images
GROWTH = GrowthConfig(enabled=True, level_kimg=LEVEL / 1000, fade_kimg=FADE / 1000, batch=(4,), lr=(0.002,))


class Grown:
    """A small style network with everything that the engine hangs on it, every storage counted."""

    def __init__(self, storages: Storages, optimizer: str) -> None:
        torch.manual_seed(0)
        self.storages = storages
        self.model = StyleConfig.tiny().build()
        players = {"encoder": self.model.encoder, "decoder": self.model.decoder}
        beta1 = 0.0 if optimizer == "lreq_adam" else 0.5
        optim = OptimConfig(PlayerOptim(beta1=beta1), PlayerOptim(beta1=beta1), optimizer)  # type: ignore[arg-type]
        self.optimizers = optim.build(players)
        self.ema = Ema(from_dict({}, "test").ema, self.model)
        objective = SoftIntroVaeConfig(beta_neg=4.0, decoder_z="reencode", draws="fresh").build(self.model.sample_shape)
        models = (self.model, self.ema.model)
        strategy = Replicated(players, self.optimizers)
        self.growing = Growing(GROWTH, models, strategy, objective, batch=4)
        self.iteration = Iteration(self.model, objective, strategy)

    def through(self, level: int) -> int:
        """An iteration within the level's fade and one after it; bytes alive afterwards."""
        for start in (level * LEVEL + 4, level * LEVEL + FADE):
            self.growing.enter(start)
            position = torch.arange(start, start + 4)
            x = counters.normal(counters.key(3, "x"), position, (3, 16, 16), torch.float32)
            batch = self.growing.prepare(HostBatch(x.tanh(), position), start, torch.device("cpu"))
            report = self.iteration(batch, nimg=start, global_batch=4)
            assert report.skip is None
            self.ema.update(self.model, start + 4, 4)
            del x, batch, report, position
        gc.collect()
        return self.storages.now


@pytest.mark.parametrize("optimizer", ["lreq_adam", "adam"])
def test_going_through_the_levels_again_and_again(optimizer: str) -> None:
    """Up and down: each time as many bytes as a network has that was never at another level."""
    fresh = []
    for level in range(3):
        with Storages() as storages:
            fresh.append(Grown(storages, optimizer).through(level))
    assert fresh[0] < fresh[1] < fresh[2]
    with Storages() as storages:
        grown = Grown(storages, optimizer)
        for level in [0, 1, 2, 1, 0, 2, 0]:
            assert grown.through(level) == fresh[level], level
    del grown
    gc.collect()
    assert storages.now == 0


def test_a_run_keeps_its_loader_processes(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three levels with three batch sizes and fades: the same processes serve them all, and are gone at the end."""
    values = growing(shards)
    values["data"] = {**values["data"], "workers": 2}
    seen: list[tuple[float, frozenset[int]]] = []
    prepare = Growing.prepare

    def watched(self: Growing, batch: HostBatch, nimg: int, *where: Any) -> Any:
        stage = self.stage(nimg)
        assert stage is not None
        seen.append((stage.level, frozenset(descendants())))
        return prepare(self, batch, nimg, *where)

    before = descendants()
    monkeypatch.setattr(Growing, "prepare", watched)
    sivae_dist.train(from_dict(values, "test"), tmp_path / "run")
    assert {level for level, _ in seen} == {0, 1, 2}
    serving = seen[0][1] - before
    assert len(serving) >= 2
    assert all(pids == seen[0][1] for _, pids in seen)
    assert not serving & descendants()


def descendants(pid: int | None = None) -> set[int]:
    """Processes below this one that are no zombies."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid or os.getpid()}/task").glob("*"):
        try:
            for child in (task / "children").read_text().split():
                state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
                found |= ({int(child)} if state != "Z" else set()) | descendants(int(child))
        except OSError:  # it ended meanwhile
            continue
    return found

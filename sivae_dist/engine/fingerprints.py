"""fingerprints.jsonl: what a run was made of, in few numbers a row, so that `sivae-dist diff` can compare two.

A row belongs to the iteration that ended at `nimg`. Everything has a hash of its bits, and a norm beside it that tells
whether other bits are close:

    {"nimg", "size", "salt",
     "data":      {"positions": HASH, "x": [HASH, NORM]}    of the whole batch, as the networks saw it
     "noise":     [HASH, NORM]                              all draws of the objective
     "losses":    {"PHASE/TERM": mean over the batch}       in the order of the phases
     "gradients": {"PHASE/PLAYER": [HASH, NORM]}            summed over ranks, clipped; HASH null where a strategy has
                                                            them as flat shards only
     "weights", "average", "optimizer": {PLAYER: [HASH, NORM]}   after the iteration
     "took_s"}                                              what the row cost

The first row (nimg 0) has weights only: those before the first iteration. Samples are hashed with their positions, so
nothing depends on how ranks share a batch. Like metrics.jsonl the file is cut back where a run resumes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sivae_dist import counters
from sivae_dist.data import Batch
from sivae_dist.distributed.digest import digest, rows
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.strategy import Strategy
from sivae_dist.engine.agreement import optimizer_tensors
from sivae_dist.engine.iteration import IterationReport
from sivae_dist.engine.run_folder import RunFolder
from sivae_dist.engine.schedule import due
from sivae_dist.engine.tracking import cut_back
from sivae_dist.models import Autoencoder
from sivae_dist.objectives import Phase, Terms

_MASK = (1 << 64) - 1


class Fingerprints:
    """Takes and writes the rows. Collective: every rank calls the same, rank 0 writes."""

    def __init__(
        self,
        every_kimg: float,
        folder: RunFolder,
        strategy: Strategy,
        model: Autoencoder,
        average: nn.Module,
    ) -> None:
        self.every_kimg, self.path = every_kimg, folder.fingerprints
        self.strategy, self.group = strategy, strategy.group
        self.model, self.average = model, average

    def due(self, nimg: int, size: int) -> bool:
        """Whether the iteration of `size` images that ends at `nimg` gets a row: the iterations 1, 2, 4, 8, ... and
        every so many thousand images. Depends on positions only."""
        number = nimg // size
        return self.every_kimg > 0 and (number & (number - 1) == 0 or due(nimg, size, self.every_kimg))

    def begin(self, nimg: int) -> None:
        """Where a run starts, resumes or is taken back to `nimg`: later rows will be lived again."""
        if self.group.is_main:
            cut_back(self.path, nimg if nimg else -1)
        if nimg == 0 and self.every_kimg > 0:
            self._write({"nimg": 0, "weights": self._weights(self.model)})

    def look(self, batch: Batch) -> Look:
        """To be shown what the iteration on this batch does."""
        return Look(batch, self.strategy)

    def add(self, look: Look, report: IterationReport, *, nimg: int, size: int, salt: int) -> None:
        """The row of an iteration that has ended, with the average updated."""
        row: dict[str, Any] = {"nimg": nimg, "size": size, "salt": salt}
        row |= look.result() | {"losses": self._losses(report, size), "gradients": look.gradients}
        row |= {"weights": self._weights(self.model), "average": self._weights(self.average)}
        row["optimizer"] = {
            name: _pair(_moments(optimizer_tensors(self.strategy, name)), self.group)
            for name in self.strategy.optimizers
        }
        self._write(row | {"took_s": round(time.monotonic() - look.began - look.elsewhere, 6)})

    def sync(self) -> None:
        """Forces the rows to the disk, as metrics are with every checkpoint."""
        if self.group.is_main and self.path.is_file():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def _weights(self, model: nn.Module) -> dict[str, list[object]]:
        return {name: _pair(getattr(model, name).state_dict(), self.group) for name in self.strategy.players}

    def _losses(self, report: IterationReport, size: int) -> dict[str, float]:
        if not report.sums:
            return {}
        total = self.group.sum_(torch.stack([value.detach().double() for value in report.sums.values()]))
        names = ("/".join(key) for key in report.sums)
        return {name: value / size for name, value in zip(names, total.tolist(), strict=True)}

    def _write(self, row: dict[str, Any]) -> None:
        if self.group.is_main:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


class Look:
    """Sees one iteration: `observe` its gradients, `drawn` its noise. Adds up on the device until `result`.

    elsewhere: seconds since `began` that are the iteration's own.
    """

    def __init__(self, batch: Batch, strategy: Strategy) -> None:
        self.strategy, self.group = strategy, strategy.group
        self.gradients: dict[str, list[object]] = {}
        self.began, self.elsewhere = time.monotonic(), 0.0
        place = batch.x.device
        self.hashes = torch.zeros(3, dtype=torch.int64, device=place)  # positions, pictures, noise
        self.squares = torch.zeros(2, dtype=torch.float64, device=place)  # pictures, noise
        self.hashes[0] += rows(_key("positions"), batch.position, batch.position)
        self.hashes[1] += rows(_key("x"), batch.position, batch.x)
        self.squares[0] += _square(batch.x)
        self._left = time.monotonic()

    def drawn(self, name: str, position: Tensor, value: Tensor) -> None:
        """A draw (B, ...) for the samples at these positions (B,)."""
        self._enter()
        self.hashes[2] += rows(_key("noise", name), position, value)
        self.squares[1] += _square(value)
        self._left = time.monotonic()

    def observe(self, phase: Phase, _: Terms) -> None:
        """The gradients of a phase, summed over ranks, before its step."""
        self._enter()
        for name in phase.trains:
            gradients = self.strategy.gradients(name)
            if self.strategy.gradients_by_parameter:
                pair = _pair(gradients, self.group)
            else:
                squares = self.squares.new_zeros(())
                for shard in gradients.values():
                    squares += _square(shard).to(squares.device)
                pair = [None, float(self.group.sum_(squares).sqrt())]
            self.gradients[f"{phase.name}/{name}"] = pair
        self._left = time.monotonic()

    def result(self) -> dict[str, Any]:
        """data and noise of the whole batch. Collective."""
        self._enter()
        positions, x, noise = (f"{int(v) & _MASK:016x}" for v in self.group.sum_(self.hashes).tolist())
        x_norm, noise_norm = self.group.sum_(self.squares).sqrt().tolist()
        return {"data": {"positions": positions, "x": [x, x_norm]}, "noise": [noise, noise_norm]}

    def _enter(self) -> None:
        self.elsewhere += time.monotonic() - self._left


def _moments(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the counts of steps, beside which the norm of moments would be nothing."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("/step")}


def _pair(tensors: Mapping[str, Tensor], group: Group) -> list[object]:
    found = digest(tensors, group)
    return [found.hash, found.norm]


def _key(*purpose: str) -> int:
    return counters.key(0, "fingerprint", *purpose)


def _square(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values.detach(), dtype=torch.float64)
    return norm.square()

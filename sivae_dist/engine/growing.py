"""Progressive growing in the engine: brings the parts of a run to the stage that its position asks for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sivae_dist.data import Batch, HostBatch
from sivae_dist.distributed.strategy import Strategy
from sivae_dist.engine.progressive import GrowthConfig, Stage, blended
from sivae_dist.errors import UserError
from sivae_dist.models import Autoencoder
from sivae_dist.objectives import Objective


class Growing:
    """Follows a GrowthConfig; without growth everything stays as configured.

    models: those whose level follows (the trained one and the averaged one).
    """

    def __init__(
        self,
        config: GrowthConfig,
        models: tuple[Autoencoder, ...],
        strategy: Strategy,
        objective: Objective,
        *,
        batch: int,
    ) -> None:
        self.config, self.models, self.strategy, self.batch = config, models, strategy, batch
        self.strength = objective.strength
        self.level: int | None = None  # of the last iteration; None before the first
        if config.enabled and models[0].levels == 1:
            raise UserError(
                "progressive.enabled is True, but the model works at one resolution only",
                "use an architecture with levels (model.name style), or set progressive.enabled to False",
            )

    def stage(self, nimg: int) -> Stage | None:
        """What holds for the iteration that starts after `nimg` images; None without growth."""
        return self.config.at(nimg, self.models[0].levels) if self.config.enabled else None

    def size(self, nimg: int) -> int:
        """Images of that iteration over all ranks."""
        stage = self.stage(nimg)
        return stage.batch if stage is not None else self.batch

    def enter(self, nimg: int) -> None:
        """Sets level, blend and beta_neg. A new level begins with fresh optimizer state, as published."""
        stage = self.stage(nimg)
        if stage is None:
            return
        for model in self.models:
            model.set_level(stage.level, stage.blend)
        if self.level is not None and stage.level != self.level:
            self.strategy.forget()
        self.level = stage.level
        if self.strength is not None and self.strength.name == "beta_neg":
            self.strength.value = stage.beta_neg

    def prepare(
        self,
        host_batch: HostBatch,
        nimg: int,
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Batch:
        """The batch on the device, at the stage's resolution, its details faded in."""
        model, stage = self.models[0], self.stage(nimg)
        size = model.sample_shape[-1] if stage is not None else None
        batch = host_batch.to(device, model.input_range, memory_format=memory_format, size=size)
        return batch if stage is None else replace(batch, x=blended(batch.x, stage.blend))

    def lr(self, nimg: int) -> float | None:
        """Learning rate of both players, None where the section `optim` decides."""
        stage = self.stage(nimg)
        return stage.lr if stage is not None else None

    def values(self, nimg: int) -> dict[str, float]:
        """The tags `progressive/...` for the iteration that starts after `nimg` images."""
        stage = self.stage(nimg)
        if stage is None:
            return {}
        return {
            "progressive/level": float(stage.level),
            "progressive/resolution": float(self.models[0].sample_shape[-1]),
            "progressive/blend": stage.blend,
            "progressive/batch": float(stage.batch),
        }

    def state(self) -> dict[str, Any]:
        """For a checkpoint: whether the next iteration begins a level depends on the last one's."""
        return {"level": self.level}

    def load(self, state: dict[str, Any], nimg: int) -> None:
        """Takes up a checkpoint's state at `nimg` images."""
        level = state.get("level")
        self.level = level if isinstance(level, int) else None
        stage = self.stage(max(0, nimg - 1))
        if stage is not None:  # what is evaluated before the next iteration is at the last one's level
            for model in self.models:
                model.set_level(stage.level, stage.blend)

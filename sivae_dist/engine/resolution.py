"""At which resolution a run was evaluated: figures of a network that grows compare only where that is the same."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch

from sivae_dist.engine.config import RunConfig
from sivae_dist.engine.progressive import RESOLUTION
from sivae_dist.models import Autoencoder


class Resolutions:
    """Of the evaluations of a run with this configuration."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def of(self, nimg: int, metrics: Mapping[str, float]) -> int:
        """Pixels a side of the images that gave these metrics after nimg images; 0 for points.

        Growing runs tell it among their metrics. Where older ones did not, it follows from the iteration before.
        """
        told = metrics.get(RESOLUTION)
        if isinstance(told, int | float) and math.isfinite(told):
            return int(told)
        growth = self.config.progressive
        if not growth.enabled:
            return int(getattr(self.config.model, "image_size", 0))
        self._model.set_level(growth.at(max(0, nimg - 1), self._model.levels).level)
        return self._model.sample_shape[-1]

    @functools.cached_property
    def _model(self) -> Autoencoder:
        with torch.device("meta"):  # shapes only
            return self.config.model.build()

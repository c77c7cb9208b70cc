"""Evaluating a finished (or running) run from outside."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from sivae_dist.devices import cuda_used
from sivae_dist.distributed.group import Group
from sivae_dist.engine.evaluate_points import evaluator_for
from sivae_dist.engine.load import load
from sivae_dist.engine.precision import Precision
from sivae_dist.evaluation.grids import save_png


def judge(run: Path, *, images: int, checkpoint_name: str = "latest") -> tuple[dict[str, float], Path]:
    """Metrics of a run's averaged weights on the held-out split, and the path of the grid drawn beside them.

    Without a held-out split these are training images (the data set's manifest and `data info` tell the splits).
    Raises UserError when the run has no checkpoint.
    """
    trained = load(run if checkpoint_name == "latest" else run / "checkpoints" / checkpoint_name)
    device = torch.device("cuda" if cuda_used() else "cpu")
    model, config = trained.model.to(device), trained.config
    # The data are those of training, averaged down to the level that a growing model has reached.
    stream = config.data.at(model.finest_shape).build(seed=config.train.seed, salt=0, rank=0, ranks=1)
    try:
        settings = replace(config.eval, images=images)
        precision, seed = Precision("fp32", device.type), config.train.seed
        evaluator = evaluator_for(model)(settings, stream, Group(), device, precision, seed)
        results = evaluator.metrics(model) | config.progressive.evaluated(model.sample_shape[-1])
        path = run / "samples" / f"evaluate-nimg-{trained.nimg:09d}.png"
        save_png(path, evaluator.pictures(model, model, config.tracking.images)["grid"])
        return results, path
    finally:
        stream.close()

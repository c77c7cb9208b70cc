"""The training loop. It reads from top to bottom; everything it does often is a call with a name.

    shard -> HostBatch -> Batch -> phases of the objective (each: forward, backward, sum over ranks, step)
          -> average -> reports -> pictures, evaluation, checkpoint when due
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from sivae_dist.config import RunConfig, to_dict, to_yaml
from sivae_dist.distributed import launch as launching
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.distributed.sync_batch_norm import synchronise_batch_norm
from sivae_dist.engine import checkpoint, resume
from sivae_dist.engine.checkpoint_writer import CheckpointWriter
from sivae_dist.engine.clock import Clock, memory
from sivae_dist.engine.ema import Ema
from sivae_dist.engine.evaluate import Evaluator
from sivae_dist.engine.guard import Guard
from sivae_dist.engine.iteration import Iteration
from sivae_dist.engine.meters import Meters
from sivae_dist.engine.precision import Precision
from sivae_dist.engine.run_folder import RunFolder, environment, write_atomic, write_json
from sivae_dist.engine.schedule import due
from sivae_dist.engine.stopping import StopSignals
from sivae_dist.engine.tracking import Progress, Tracker, read_metrics
from sivae_dist.evaluation.grids import save_png

SHOWN = ("loss/encoder", "loss/decoder", "loss/joint", "rec/real", "kl/real", "kl/fake", "eval/psnr")


def train(config: RunConfig, out: str | Path, resume_from: str = "auto") -> Path:
    """Trains until config.train.kimg images are seen, or until asked to stop. Returns the run folder.

    resume_from: "auto" (the run's latest checkpoint, if there is one), "never" (the folder must hold no run), or the
    path of a checkpoint. Raises UserError for everything that the user can mend.
    """
    launch = launching.start(config.distributed)
    group, device = launch.group, launch.device
    run = RunFolder(out)
    saved = resume.find(run, resume_from, config)
    run.create()

    # Model, players and data. Every rank builds the same weights from the seed; rank 0's are sent to all anyway.
    torch.manual_seed(config.train.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision.tf32
    layout = torch.channels_last if config.precision.channels_last else torch.contiguous_format
    model = synchronise_batch_norm(config.model.build(), group).to(device)
    images = len(model.sample_shape) == 3
    if images:
        model = model.to(memory_format=layout)
    players = {"encoder": model.encoder, "decoder": model.decoder}
    optimizers = config.optim.build(players)
    strategy = Replicated(players, optimizers, group, clip_norm=config.optim.clip_norm)
    ema = Ema(config.ema, model)
    nimg, salt = 0, 0
    meters = Meters(group, device)
    if saved is not None:
        checkpoint.restore(saved, model, ema.model, optimizers)
        nimg, salt = saved.nimg, int(saved.state["plan_salt"])
        meters.load(saved.state["sums"])
    stream = config.data.build(seed=config.train.seed, salt=salt, rank=group.rank, ranks=group.ranks)
    resume.check_fits(stream, model, saved)
    precision = Precision(config.precision.resolved(), device.type)
    objective = config.objective.build(model.sample_shape)
    iteration = Iteration(
        model, objective, strategy, seed=config.train.seed, accumulation=config.train.accumulation, precision=precision
    )
    evaluator = Evaluator(config.eval, stream, group, device, precision, config.train.seed)

    # What the run tells and keeps.
    if group.is_main:
        write_atomic(run.config, to_yaml(config))
        manifest = {**environment(), "data": stream.fingerprint, "launch": launch.describe(), "started_nimg": nimg}
        write_json(run.manifest, manifest)
    tracker = Tracker(config.tracking, run, resumed_nimg=nimg, is_main=group.is_main)
    writer = CheckpointWriter(config.checkpoint, run.checkpoints)
    total, size = config.train.total_nimg, config.train.batch
    progress = Progress(total, nimg, enabled=config.tracking.progress and group.is_main)
    guard = Guard(group)
    clock = Clock()
    newest: dict[str, float] = {}

    def evaluate() -> dict[str, float]:
        results = evaluator.metrics(ema.model) if evaluator.available else {}
        tracker.scalars(nimg, results)
        return results

    def draw() -> None:
        pictures = evaluator.pictures(model, ema.model, config.tracking.images)
        for tag, picture in pictures.items():
            if group.is_main and tag == "grid":
                save_png(run.samples / f"nimg-{nimg:09d}.png", picture)
            else:
                tracker.image(nimg, tag, picture)

    def save(metrics: dict[str, float]) -> None:
        meters.settle()
        if group.is_main:
            tracker.sync()
            state = {
                "plan_salt": salt,
                "sums": meters.state(),
                "metrics": metrics,
                "data": stream.fingerprint,
                "config": to_dict(config),
            }
            writer.save(checkpoint.snapshot(nimg, model, ema.model, optimizers, state))

    if nimg == 0 and config.eval.at_start:
        newest |= evaluate()
    batches = stream.batches(nimg, size)
    stopped = False
    try:
        with StopSignals(group) as stop:
            while nimg < total and not stopped:
                clock.begin()
                host_batch = next(batches)
                clock.data_arrived()
                batch = host_batch.to(device, model.input_range, memory_format=layout)
                rates = config.optim.apply(optimizers, nimg)
                report = iteration(batch, nimg=nimg, global_batch=size)
                nimg += size
                guard.check(report, nimg)
                ema.update(model, nimg, size)
                meters.add(report, size)
                clock.end(size)
                progress.advance(size)
                stopped = stop.agreed()
                last = nimg >= total or stopped

                results: dict[str, float] = {}
                if due(nimg, size, config.tracking.every_kimg) or last:
                    values = {**meters.means(), **{f"lr/{player}": rate for player, rate in rates.items()}}
                    values |= {**clock.read(), **memory(device), **guard.counts(), "data/epoch": nimg / stream.epoch_size}
                    tracker.scalars(nimg, values)
                    newest |= values
                    progress.show(newest, SHOWN)
                if due(nimg, size, config.eval.every_kimg) or (nimg >= total):
                    results = evaluate()
                    newest |= results
                if due(nimg, size, config.tracking.images_every_kimg) or nimg >= total:
                    draw()
                if due(nimg, size, config.checkpoint.every_kimg) or last:
                    save(results)
    finally:
        stream.close()
        progress.close()
        writer.close()
        tracker.close()

    if group.is_main:
        write_json(run.summary, summarise(run, nimg, finished=nimg >= total))
    launch.finish()
    return run.root


def summarise(run: RunFolder, nimg: int, *, finished: bool) -> dict[str, object]:
    """Contents of summary.json: how far the run came, its newest metrics, and how they compare with the untrained model."""
    rows = read_metrics(run.metrics)
    newest: dict[str, float] = {}
    for row in rows:
        newest |= row
    first = next((row for row in rows if "eval/psnr" in row and row["nimg"] == 0), {})
    grids = sorted(run.samples.glob("nimg-*.png"))
    summary: dict[str, object] = {
        "finished": finished,
        "nimg": nimg,
        "kimg": nimg / 1000,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "metrics": {key: value for key, value in newest.items() if key != "nimg"},
        "grid": str(grids[-1].relative_to(run.root)) if grids else None,
    }
    if "eval/psnr" in newest:
        summary["psnr_gain_over_mean_image_db"] = newest["eval/psnr"] - newest["eval/psnr_mean_image"]
    if "eval/swd" in first:
        summary["swd_untrained"] = first["eval/swd"]
        summary["swd_ratio_to_untrained"] = newest["eval/swd"] / first["eval/swd"]
    return summary

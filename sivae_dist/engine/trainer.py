"""The training loop. `Trainer.run` reads from top to bottom; everything it does is a call with a name.

shard -> HostBatch -> Batch -> phases of the objective (each: forward, backward, sum over ranks, step)
      -> average -> report, evaluation, pictures, checkpoint when due
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sivae_dist.data import HostBatch, Stream
from sivae_dist.data.ahead import DevicePrefetcher
from sivae_dist.distributed import launch as launching
from sivae_dist.distributed import strategies
from sivae_dist.distributed.failure import announced
from sivae_dist.distributed.sharding import whole_model
from sivae_dist.distributed.sync_batch_norm import synchronise_batch_norm
from sivae_dist.engine import agreement, checkpoint, checkpoint_sharded, host_memory, notes, resume
from sivae_dist.engine.checkpoint import Snapshot
from sivae_dist.engine.clock import Clock, memory
from sivae_dist.engine.config import RunConfig, to_dict, to_yaml
from sivae_dist.engine.controller import Controller
from sivae_dist.engine.ema import Ema
from sivae_dist.engine.evaluate_points import evaluator_for
from sivae_dist.engine.fingerprints import Fingerprints
from sivae_dist.engine.growing import Growing
from sivae_dist.engine.guard import Guard
from sivae_dist.engine.iteration import Iteration
from sivae_dist.engine.logs import log
from sivae_dist.engine.loss_scale import LossScales
from sivae_dist.engine.losses import DataLosses
from sivae_dist.engine.meters import Meters
from sivae_dist.engine.precision import Precision
from sivae_dist.engine.run_folder import RunFolder, environment
from sivae_dist.engine.run_lock import RunLock
from sivae_dist.engine.schedule import due
from sivae_dist.engine.stopping import StopSignals
from sivae_dist.engine.summary import summarise
from sivae_dist.engine.tracking import Progress, Tracker
from sivae_dist.errors import UserError
from sivae_dist.evaluation.grids import save_png
from sivae_dist.files import write_atomically, write_json
from sivae_dist.models import Autoencoder, unmoved
from sivae_dist.models.blocks import recompute_blocks
from sivae_dist.objectives import Objective
from sivae_dist.ops import kernels


class Trainer:
    """One run in one process: builds all parts, restores them, loops, and leaves a summary.

    writes: whether this run owns its folder; without it nothing there is touched (a dry run).
    """

    def __init__(self, config: RunConfig, out: str | Path, resume_from: str, *, writes: bool = True) -> None:
        self.config, self.folder = config, RunFolder(out)
        self.launch = launching.start(config.distributed)
        self.group, self.device = self.launch.group, self.launch.device
        self.lock: RunLock | None = None
        agreement.check_start(self.group, config, self.device)
        config.data.check()
        if writes and self.group.is_main:
            self.folder.create()
            self.lock = RunLock(self.folder.root)
            checkpoint.sweep(self.folder.checkpoints)
        try:
            self._build(resume_from)
        except BaseException:  # whoever mends what was wrong in the same process finds the folder free
            self.release()
            raise

    def release(self) -> None:
        """Gives the run folder back to others."""
        if self.lock is not None:
            self.lock.release()

    def _build(self, resume_from: str) -> None:
        """All parts, with what they were in the checkpoint to go on from."""
        config = self.config
        self.kernels = kernels.configure(config.kernels, self.device, used=config.model.fused_operators)
        if self.device.type == "cpu":
            host_memory.keep_freed(config.train.keep_freed_mb)
        saved = resume.find(self.folder, resume_from, config)

        # Every rank builds the same weights from the seed; the strategy sends rank 0's to all anyway.
        torch.manual_seed(config.train.seed)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision.tf32
        self.layout = torch.channels_last if config.precision.channels_last else torch.contiguous_format
        self.model = self._build_model()
        players = {"encoder": self.model.encoder, "decoder": self.model.decoder}
        self.optimizers = config.optim.build(players)
        self.ema = Ema(config.ema, self.model)  # of the model that is still whole
        self.strategy = strategies.build(
            config.distributed, players, self.optimizers, self.group, clip_norm=config.optim.clip_norm
        )
        self.strategy.follow(self.ema.model, self.model)
        self.optimizers = self.strategy.optimizers
        every = config.tracking.fingerprints_every_kimg
        self.prints = Fingerprints(every, self.folder, self.strategy, self.model, self.ema.model)
        self.meters = Meters(self.group, self.device)
        self.clock = Clock()
        self.losses = DataLosses(self.group, config.data, self.folder.root)
        self.guard = Guard(config.guard, self.group)
        precision = Precision(config.precision.resolved(), self.device.type)
        self.scales = LossScales.of_config(config.precision)
        objective = build_objective(config, self.model)
        self.controller = Controller(config.controller, objective, Meters(self.group, self.device))
        models = (self.model, self.ema.model)
        self.growing = Growing(config.progressive, models, self.strategy, objective, batch=config.train.batch)
        self.iteration = Iteration(
            self.model,
            objective,
            self.strategy,
            seed=config.train.seed,
            accumulation=config.train.accumulation,
            precision=precision,
            scales=self.scales,
            decode_once=config.train.decode_once,
        )

        # The whole position of a run: images seen, and the salt of data order and noise.
        self.nimg, self.salt = 0, 0
        self.saved_nimg = 0  # where the last checkpoint was written or read
        self.good: Path | None = None  # the checkpoint to go back to; None: the beginning
        self.origin: dict[str, str] | None = None  # of a run that began at another's checkpoint
        if saved is not None:
            with resume.reading_state_of(saved):
                self._restore(saved)
                self.guard.load(saved.state.get("guard", {}))
                self.salt, self.good = int(saved.state["plan_salt"]), saved.path
                self.origin = saved.state.get(resume.ORIGIN)
        self.stream = self._open_stream()
        resume.check_fits(self.stream, self.model.finest_shape, self.model, saved)
        agreement.check_state(self.group, config, self._facts(), self._tensors())
        judges = evaluator_for(self.model)
        self.evaluator = judges(config.eval, self.stream, self.group, self.device, precision, config.train.seed)
        self.newest: dict[str, float] = {}  # of the last report and evaluation, for the progress line

    def _facts(self) -> dict[str, str]:
        """Where this rank begins; the same on all."""
        facts = {"the checkpoint": self.good.name if self.good else "none", "images seen": str(self.nimg)}
        facts |= {"the salt": str(self.salt), "the data": self.stream.fingerprint}
        return facts | {f"the kernels' {key}": str(self.kernels[key]) for key in ("mode", "running")}

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return agreement.state_tensors(self.model, self.ema.model, self.strategy)

    def _build_model(self) -> Autoencoder:
        model = synchronise_batch_norm(self.config.model.build(), self.group).to(self.device)
        if len(model.sample_shape) == 3:  # images; points have no channels to put last
            model.to(memory_format=self.layout)  # type: ignore[call-overload]
        recompute_blocks(model, self.config.train.recompute_from)
        return model

    def _open_stream(self) -> Stream:
        self.iteration.salt = self.salt
        seed, group = self.config.train.seed, self.group
        data = self.config.data.at(self.model.finest_shape)
        return data.build(seed=seed, salt=self.salt, rank=group.rank, ranks=group.ranks)

    def _restore(self, saved: Snapshot) -> None:
        restore = checkpoint_sharded.restore if saved.sharded else checkpoint.restore
        restore(saved, self.model, self.ema.model, self.strategy)
        self.nimg = self.saved_nimg = saved.nimg
        self.meters.load(saved.state["sums"])
        self.clock.load(saved.state.get("clock", {}), saved.nimg)
        self.scales.load(saved.state.get("loss_scales", {}))
        self.controller.load(saved.state.get("controller", {}))
        self.growing.load(saved.state.get("growing", {}), self.nimg)
        self.losses.load(saved.state.get("data_losses", {}))

    def run(self) -> bool:
        """The loop, then the summary. Returns whether the end was reached (else the run was asked to stop)."""
        config, growing, total = self.config, self.growing, self.config.train.total_nimg
        log.info("from %d to %d images, salt %d, %s", self.nimg, total, self.salt, self.launch.describe())
        self._describe()
        if self.group.is_main:
            resume.settle(self.folder, self.good)
        notes.tell(notes.before(config, self.model.levels, self.folder, self.nimg), main=self.group.is_main)
        self.tracker = Tracker(config.tracking, self.folder, resumed_nimg=self.nimg, is_main=self.group.is_main)
        self.writer = checkpoint_sharded.writer_for(config.checkpoint, self.folder.checkpoints, self.group)
        self.prints.begin(self.nimg)
        self.progress = Progress(total, self.nimg, enabled=config.tracking.progress and self.group.is_main)

        if self.nimg == 0:
            growing.enter(0)
            if config.eval.at_start:
                self._evaluate()
        drawn = config.tracking.images_every_kimg
        batches = self._batches()
        ran = save_due = False  # ran: an iteration has ended since the start or the last rollback
        results: dict[str, float] = {}
        try:
            with StopSignals(config.train.minutes) as stop:
                while self.nimg < total:
                    self.clock.begin()
                    host_batch = self._next(batches, may_stop=stop if ran else None)
                    if host_batch is None:
                        if self.nimg != self.saved_nimg:
                            self._save(results)
                        break
                    self.clock.data_arrived()
                    growing.enter(self.nimg)
                    batch = growing.prepare(host_batch, self.nimg, self.device, self.layout)
                    del host_batch  # its bytes make room for those of the next one
                    rates = config.optim.apply(self.optimizers, self.nimg, growing.lr(self.nimg))
                    size = growing.size(self.nimg)
                    look = self.prints.look(batch) if self.prints.due(self.nimg + size, size) else None
                    self.iteration.drawn, observe = (look.drawn, look.observe) if look is not None else (None, None)
                    report = self.iteration(batch, nimg=self.nimg, global_batch=size, observe=observe)
                    self.nimg += size
                    if batches.early and self.nimg < total:
                        with self.clock.waiting():
                            batches.ahead()
                    if not self.guard.passed(report.skip, self.nimg):
                        batches, ran = self._roll_back(), False
                        continue
                    self.ema.update(self.model, self.nimg, size)
                    if look is not None and report.skip is None:
                        self.prints.add(look, report, nimg=self.nimg, size=size, salt=self.salt)
                    self.meters.add(report, size)
                    self.controller.after(report, self.nimg, size)
                    self.clock.end(size)
                    self.writer.raise_failure()
                    self.progress.advance(size)

                    finished, ran, results = self.nimg >= total, True, {}
                    if due(self.nimg, size, config.tracking.every_kimg) or finished:
                        self._report(rates, size)
                        self.progress.show(self.newest)
                    if due(self.nimg, size, config.eval.every_kimg) or finished:
                        results = self._evaluate()
                    if due(self.nimg, size, drawn) or (finished and drawn > 0):
                        self._draw()
                    save_due |= due(self.nimg, size, config.checkpoint.every_kimg)
                    if (save_due and self.guard.calm) or finished:
                        self._save(results)
                        save_due = False
        finally:
            self.stream.close()
            self.progress.close()
            self.writer.close()
            self.tracker.close()
        self._conclude(finished=self.nimg >= total)
        return self.nimg >= total

    def _next(self, batches: Iterator[HostBatch], may_stop: StopSignals | None) -> HostBatch | None:
        """The next batch; None if the run should stop here, asked on any rank. Collective, with one answer for both.

        Where the data fail for a rank, all save together what was trained since the last checkpoint; the error is then
        raised on the rank that has it, and one without a text on the others.
        """
        failed: Exception | None = None
        asked = may_stop is not None and may_stop.asked_by_now()
        if asked and self.group.ranks == 1:
            return None  # without waiting for data that nobody needs
        try:
            host_batch = next(batches)
        except Exception as error:
            failed = error
        report = host_batch.report if failed is None else None
        any_failed, any_asked, too_many = self.losses.agree(
            failed is not None, asked, report, self.nimg, self.stream.epoch_size
        )
        if any_asked:
            return None  # data that fail now fail again after a resume
        if not any_failed and too_many is None:
            self.losses.take(report)
            return host_batch
        if self.nimg != self.saved_nimg:
            self._save({})
            self.writer.wait()
        self.group.barrier()  # the end of any rank is the end of all
        if failed is None and too_many is None:
            announced()
            raise UserError("")
        raise failed or too_many or UserError("")

    def _describe(self) -> None:
        if self.group.is_main:
            write_atomically(self.folder.config, to_yaml(self.config))
            facts: dict[str, object] = {"launch": self.launch.describe(), "started_at_nimg": self.nimg}
            facts |= {"data": self.stream.fingerprint, "evaluated_on": self.stream.held_out_split}
            facts |= {"strategy": self.strategy.name, "kernels": self.kernels}
            facts |= {"decoder": getattr(self.stream, "decoder", None)}
            facts |= {"decode": getattr(self.config.data, "decode", None)}
            facts |= {"code": agreement.code_hash(), "versions": agreement.versions()}
            write_json(self.folder.manifest, {**environment(), **facts})

    def _report(self, rates: dict[str, float], size: int) -> None:
        """Means since the last report, speeds, memory: one row of metrics."""
        values = self.meters.means() | {f"lr/{player}": rate for player, rate in rates.items()}
        values |= self.clock.read() | self.clock.totals() | memory(self.device)
        values |= self.guard.counts() | self.scales.values() | self.controller.values()
        values |= self.growing.values(self.nimg - size)
        values |= self.strategy.traffic.take() if self.group.ranks > 1 else {}
        values |= self.losses.values()
        values["data/epoch"] = self.nimg / self.stream.epoch_size
        self.tracker.scalars(self.nimg, values)
        evaluated = {tag: value for tag, value in self.newest.items() if tag.startswith("eval/")}
        self.newest = evaluated | values  # losses of phases that are over do not stay on the line

    def _evaluate(self) -> dict[str, float]:
        """Metrics of the averaged model on held-out data (or training data, if the data have no such split)."""
        average = whole_model(self.ema.model)
        with unmoved(average):
            results = self.evaluator.metrics(average)
        results |= self.config.progressive.evaluated(average.sample_shape[-1])
        log.info("evaluation at %d images: %s", self.nimg, results)
        self.tracker.scalars(self.nimg, results | self.clock.totals())
        self.newest |= results
        return results

    def _draw(self) -> None:
        """Picture grids into TensorBoard and the run's samples folder."""
        average = whole_model(self.ema.model)
        # Only the average can be copied where players are sharded; the trained model is where there is nothing to copy.
        current = self.model if average is self.ema.model else whole_model(average, self.model.state_dict())
        if not self.group.is_main:
            return
        with unmoved(current, average):
            pictures = self.evaluator.pictures(current, average, self.config.tracking.images)
        save_png(self.folder.samples / f"nimg-{self.nimg:09d}.png", pictures.pop("grid"))
        for tag, picture in pictures.items():
            self.tracker.image(self.nimg, tag, picture)

    def _save(self, results: dict[str, float]) -> None:
        """Begins a checkpoint. results: what was evaluated at exactly this point; ranks checkpoints for retention."""
        agreement.check_weights(self.group, self.config, self.nimg, self._tensors())
        self.saved_nimg = self.nimg
        self.meters.settle()
        self.controller.meters.settle()
        self.losses.settle()
        if self.guard.calm:
            self.good = self.folder.checkpoints / checkpoint.name_of(self.nimg)
        if self.group.is_main:
            log.info("checkpoint at %d images", self.nimg)
            self.tracker.sync()
            self.prints.sync()
        state = {
            "plan_salt": self.salt,
            "sums": self.meters.state(),
            "clock": self.clock.state(),
            "guard": self.guard.state(),
            "loss_scales": self.scales.state(),
            "controller": self.controller.state(),
            "growing": self.growing.state(),
            "data_losses": self.losses.state(),
            "metrics": results,
            "data": self.stream.fingerprint,
            "config": to_dict(self.config),
            resume.ORIGIN: self.origin,
        }
        began = time.monotonic()
        self.writer.take(self.nimg, self.model, self.ema.model, self.strategy, state)
        log.info("training waited %.3f s for it", time.monotonic() - began)

    def _batches(self) -> DevicePrefetcher:
        """The stream from here on."""
        return DevicePrefetcher(self.stream.batches(self.nimg, self.growing.size), self.device)

    def _roll_back(self) -> DevicePrefetcher:
        """To the last good checkpoint, or the beginning; from there on with other data order and noise."""
        self.guard.roll_back(self.nimg, self.good.name if self.good else "the beginning")
        self.writer.wait()
        self.group.barrier()  # now the checkpoint is there for all ranks
        self._restore(checkpoint.read(self.good, parts=False) if self.good else self._beginning())
        self.tracker.rewind(self.nimg)
        self.prints.begin(self.nimg)
        self.progress.rewind(self.nimg)
        self.stream.close()
        self.salt += 1
        self.stream = self._open_stream()
        return self._batches()

    def _beginning(self) -> Snapshot:
        """The state before the first image, made anew from the seed."""
        torch.manual_seed(self.config.train.seed)
        weights = self.config.model.build().state_dict()
        return Snapshot(0, {"weights": weights, "ema": weights, "optimizer": {}}, {"sums": {}})

    def _conclude(self, *, finished: bool) -> None:
        log.info("%s at %d images", "finished" if finished else "stopped when asked to", self.nimg)
        if self.group.is_main:
            write_json(self.folder.summary, summarise(self.folder, self.config, self.nimg, finished=finished))
        self.launch.finish()


def build_objective(config: RunConfig, model: Autoencoder) -> Objective:
    """The objective for this model's samples. Raises UserError for values out of range."""
    try:
        return config.objective.build(model.sample_shape)
    except ValueError as error:  # objectives know no UserError: they import only torch
        raise UserError(str(error), "correct the value in the config or on the command line") from error

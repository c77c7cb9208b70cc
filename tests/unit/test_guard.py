"""The finite check, what a skip puts back, patience, loss scales, saturation shares."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from sivae_dist.data import Batch
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.replicated import Gradient, Replicated
from sivae_dist.engine.finite import Skip, examine
from sivae_dist.engine.guard import Guard, GuardConfig
from sivae_dist.engine.iteration import Iteration, IterationReport
from sivae_dist.engine.loss_scale import LossScales
from sivae_dist.engine.meters import Meters
from sivae_dist.engine.optim import OptimConfig
from sivae_dist.engine.tally import Tally
from sivae_dist.errors import UserError
from sivae_dist.models import Posterior
from sivae_dist.models.residual import ResidualConfig
from sivae_dist.objectives import Terms
from sivae_dist.objectives.soft_introvae import SoftIntroVaeConfig

CPU = torch.device("cpu")


def iteration(**options: Any) -> Iteration:
    torch.manual_seed(0)
    model = ResidualConfig.tiny().build()
    players = {"encoder": model.encoder, "decoder": model.decoder}
    objective = SoftIntroVaeConfig(beta_neg=4.0).build(model.sample_shape)
    return Iteration(model, objective, Replicated(players, OptimConfig().build(players)), **options)


def batch(size: int = 6) -> Batch:
    return Batch(torch.rand(size, 3, 12, 12, generator=torch.Generator().manual_seed(1)), torch.arange(size))


def state(step: Iteration) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in step.model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def test_examine_names_what_is_not_finite() -> None:
    fine = Gradient(torch.tensor(1.0), torch.tensor(1.0))
    sums = {"rec": torch.tensor(2.0), "loss": torch.tensor(3.0)}
    assert examine("encoder", torch.ones(2), sums, {"encoder": fine}, Group()) is None
    bad_term = examine("encoder", torch.ones(2), {**sums, "rec": torch.tensor(math.inf)}, {"encoder": fine}, Group())
    assert bad_term is not None
    assert (bad_term.text(), bad_term.forward, bad_term.players) == ("rank 0: encoder/rec", True, set())
    broken = Gradient(torch.tensor(math.nan), torch.tensor(math.nan))
    bad_gradient = examine("joint", torch.ones(2), sums, {"encoder": fine, "decoder": broken}, Group())
    assert bad_gradient is not None
    assert (bad_gradient.text(), bad_gradient.forward) == ("rank 0: gradient of the decoder", False)
    assert bad_gradient.players == {"decoder"}
    overflown = examine(
        "decoder", torch.ones(2), sums, {"decoder": Gradient(torch.tensor(math.inf), fine.local)}, Group()
    )
    assert overflown is not None
    assert overflown.text() == "the sum over ranks of the gradient of the decoder"


class SecondRank(Group):
    """As rank 0 sees it: rank 1 has a non-finite `rec`, this rank has none."""

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.add_(torch.tensor([0.0, 1.0, 0.0, 0.0]))

    def texts(self, text: str) -> list[str]:
        return [text, "encoder/rec"]


def test_a_term_of_another_rank_counts_although_its_gradient_is_finite() -> None:
    sums = {"rec": torch.tensor(2.0), "loss": torch.tensor(3.0)}
    fine = Gradient(torch.tensor(1.0), torch.tensor(1.0))
    skip = examine("encoder", torch.ones(2), sums, {"encoder": fine}, SecondRank())
    assert skip is not None
    assert (skip.text(), skip.count, skip.forward) == ("rank 1: encoder/rec", 1, True)


def test_a_skipped_first_phase_leaves_everything_as_it_was() -> None:
    step = iteration()
    step(batch(), nimg=0, global_batch=6)
    before = state(step)
    bad = batch()
    bad.x[0, 0, 0, 0] = math.nan
    report = step(bad, nimg=6, global_batch=6)
    assert report.skip is not None
    assert report.skip.phase == "encoder"
    assert not changed(before, state(step))
    assert not report.sums
    assert not report.grad_norm
    assert not report.shares
    assert step(batch(), nimg=12, global_batch=6).skip is None


def test_running_statistics_that_are_not_finite_are_taken_back() -> None:
    """Also where everything that came of them is finite: they would be the next evaluation's."""
    step = iteration()
    step(batch(), nimg=0, global_batch=6)
    before = state(step)

    def observe(phase: Any, _terms: Terms) -> None:
        if phase.name == "encoder":
            next(buffer for buffer in step.model.encoder.buffers() if buffer.is_floating_point())[0] = math.inf

    report = step(batch(), nimg=6, global_batch=6, observe=observe)
    assert report.skip is not None
    assert (report.skip.text(), report.skip.forward) == ("rank 0: running statistics", True)
    assert not changed(before, state(step))


def test_a_skipped_second_phase_takes_back_its_own_only(monkeypatch: pytest.MonkeyPatch) -> None:
    step = iteration()
    between: dict[str, torch.Tensor] = {}

    def observe(phase: Any, _terms: Terms) -> None:
        if phase.name == "decoder":
            between.update(state(step))  # weights as the encoder phase left them; buffers are moved on already

    reduce = Replicated.reduce

    def reduce_spoilt(self: Replicated, name: str, **options: Any) -> Gradient:
        if name == "decoder":
            next(self.players[name].parameters()).grad.fill_(math.nan)
        return reduce(self, name, **options)

    buffers: dict[str, torch.Tensor] = {}
    train_only = Replicated.train_only

    def note(self: Replicated, names: Any) -> None:
        if "decoder" in names:
            buffers.update({name: tensor.clone() for name, tensor in step.model.named_buffers()})
        train_only(self, names)

    monkeypatch.setattr(Replicated, "reduce", reduce_spoilt)
    monkeypatch.setattr(Replicated, "train_only", note)
    before = state(step)
    report = step(batch(), nimg=0, global_batch=6, observe=observe)
    assert report.skip is not None
    assert report.skip.phase == "decoder"
    assert changed(before, state(step)) >= {"encoder.head.weight"}
    assert not any(name.startswith("decoder") and not name.endswith(("running_mean", "running_var", "tracked"))
                   for name in changed(before, state(step)))  # fmt: skip
    for name, tensor in step.model.named_buffers():
        assert torch.equal(tensor, buffers[name]), name
        assert not torch.equal(tensor, between[name]) or tensor.numel() == 0, name
    assert {phase for phase, _ in report.sums} == {"encoder"}


def test_the_salt_changes_the_noise() -> None:
    terms = [iteration(salt=salt)(batch(), nimg=0, global_batch=6).sums["encoder", "rec"] for salt in (0, 0, 1)]
    assert terms[0] == terms[1] != terms[2]


def test_meters_hold_only_what_was_finite() -> None:
    step, meters = iteration(), Meters(Group(), CPU)
    good = step(batch(), nimg=0, global_batch=6)
    meters.add(good, 6)
    bad = batch()
    bad.x.fill_(math.inf)
    meters.add(step(bad, nimg=6, global_batch=6), 6)
    means = meters.means()
    assert all(math.isfinite(value) for value in means.values())
    assert means["rec/real"] == pytest.approx(float(good.sums["encoder", "rec"]) / 6)


def test_patience_and_rollbacks(capsys: pytest.CaptureFixture[str]) -> None:
    guard = Guard(GuardConfig(patience=2, max_rollbacks=1), Group())
    skip = Skip("encoder", ["encoder/rec"], 1, set(), forward=True)
    assert [guard.passed(s, 10) for s in (skip, None, skip, skip)] == [True, True, True, False]
    assert (
        "not finite at 10 images, phase encoder skipped on all ranks (rank 0: encoder/rec)" in capsys.readouterr().err
    )
    assert not guard.calm
    guard.roll_back(30, "nimg-000000020")
    assert guard.calm
    assert guard.counts() == {
        "guard/nonfinite": 3, "guard/skipped": 3, "guard/overflows": 0, "guard/rollbacks": 1
    }  # fmt: skip
    again = Guard(guard.config, Group())
    again.load(json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state()
    overflow = Skip("encoder", ["x"], 1, {"encoder"}, forward=False, overflow=True)
    assert all(again.passed(overflow, 40) for _ in range(5))
    assert (again.overflows, again.skipped) == (5, 3)
    with pytest.raises(UserError, match="rolled back 1 times already"):
        again.roll_back(50, "nimg-000000020")
    for wrong in ({"patience": 0}, {"max_rollbacks": -1}):
        with pytest.raises(UserError, match="not all in range"):
            GuardConfig(**wrong)


def test_loss_scales() -> None:
    scales = LossScales(enabled=True, start=8.0, steps=2)
    both = ("encoder", "decoder")
    overflow = Skip("encoder", ["x"], 1, {"encoder"}, forward=False)
    scales.of(both)
    scales.update(("encoder",), overflow)
    assert overflow.overflow
    assert (scales.of(("encoder",)), scales.of(("decoder",)), scales.of(both)) == (4, 8, 4)
    for _ in range(2):
        scales.update(("encoder",), None)
    assert scales.of(("encoder",)) == 8
    again = LossScales(enabled=True, start=8.0, steps=2)
    scales.update(("decoder",), None)
    again.load(json.loads(json.dumps(scales.state())))
    for each in (scales, again):
        each.update(("decoder",), None)
    assert again.state() == scales.state()
    forward = Skip("encoder", ["x"], 1, {"encoder"}, forward=True)
    scales.update(("encoder",), forward)
    assert not forward.overflow
    assert scales.of(("encoder",)) == 8
    for _ in range(9):
        scales.update(("encoder",), last := Skip("encoder", ["x"], 1, {"encoder"}, forward=False))
    assert scales.of(("encoder",)) == 1
    assert not last.overflow  # at scale 1 it is a non-finite gradient like any other
    assert LossScales().of(both) == 1


def test_a_power_of_two_scale_changes_no_bit() -> None:
    plain, scaled = iteration(), iteration(scales=LossScales(enabled=True, start=2.0**12))
    for step in (plain, scaled):
        assert step(batch(), nimg=0, global_batch=6).skip is None
    assert not changed(state(plain), state(scaled))


def test_shares_of_saturated_numbers() -> None:
    tally, meters = Tally(), Meters(Group(), CPU)
    tally.watch(Posterior(torch.zeros(2, 4), torch.tensor([[-99.0, 0, 0, 99], [-99, -99, 0, 0]])))
    tally.watch(Posterior(torch.zeros(2, 4), torch.zeros(2, 4)))
    loss = torch.zeros(2)
    tally.add(Terms(loss, {"exp_elbo_rec": torch.tensor([0.0, 0.5]), "exp_elbo_fake": torch.tensor([1.0, 1.0])}))
    meters.add(IterationReport(shares=tally.shares(2, 1)), 2)
    assert meters.means() == {
        "guard/logvar_low": 3 / 16,
        "guard/logvar_high": 1 / 16,
        "guard/exp_elbo_zero": 1 / 4,
        "guard/exp_elbo_one": 2 / 4,
    }


def test_shares_of_a_real_iteration_count_all_encodings() -> None:
    """With a head of huge bias every logvar is at its upper bound, in any number of micro-batches."""
    for parts in (1, 3):
        step, meters = iteration(accumulation=parts), Meters(Group(), CPU)
        with torch.no_grad():
            step.model.encoder.head.bias[step.model.prior.shape[0] :] = 500.0
        # exp(logvar/2) makes reconstructions large but finite
        report = step(batch(), nimg=0, global_batch=6)
        assert report.skip is None, report.skip
        meters.add(report, 6)
        means = meters.means()
        assert means["guard/logvar_high"] == 1.0
        assert means["guard/logvar_low"] == 0.0
        assert means["guard/exp_elbo_zero"] > 0.5

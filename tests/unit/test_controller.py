"""The controller moves an objective's strength where it pushes fakes harder, within bounds, and resumes exactly."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from sivae_dist.distributed.group import Group
from sivae_dist.engine.controller import Controller, ControllerConfig
from sivae_dist.engine.iteration import IterationReport
from sivae_dist.engine.meters import Meters
from sivae_dist.errors import UserError
from sivae_dist.objectives import Objective
from sivae_dist.objectives.introvae import IntroVaeConfig
from sivae_dist.objectives.soft_introvae import SoftIntroVaeConfig
from sivae_dist.objectives.vae import VaeConfig

SHAPE = (3, 8, 8)  # scale 1/192, alpha 2: fakes settle at 96 ln(beta_neg) / beta_neg nats


def controller(objective: Objective, **options: Any) -> Controller:
    settings = {"enabled": True, "kl_gap": 2.0, "rate": 2.0, "every_kimg": 1.0, **options}
    return Controller(ControllerConfig(**settings), objective, Meters(Group(), torch.device("cpu")))


def report(kl_real: float, kl_fake: float, batch: int) -> IterationReport:
    sums = {("encoder", "kl_real"): kl_real * batch, ("encoder", "kl_fake"): kl_fake * batch}
    return IterationReport({key: torch.tensor(value) for key, value in sums.items()})


def live(control: Controller, kimg: int, kl_real: float, kl_fake: float, start: int = 0) -> None:
    for nimg in range(start + 250, start + 1000 * kimg + 1, 250):
        control.after(report(kl_real, kl_fake, 250), nimg, 250)


def test_settling_beta_neg_solves_its_equation() -> None:
    for config in (SoftIntroVaeConfig(), SoftIntroVaeConfig(beta_kl=0.5, beta_rec=0.2, gamma=2.0, alpha=1.0)):
        objective, scale = config.build(SHAPE), 1 / 192
        for kl, rec in ((3.0, 0.0), (8.0, 10.0), (20.0, 1.0)):
            beta_neg = objective.settling_beta_neg(kl, rec)
            push = scale * beta_neg * math.exp(-config.alpha * scale * (config.beta_rec * rec + beta_neg * kl))
            assert push == pytest.approx(scale * config.gamma * config.beta_kl, rel=1e-6)
            weaker = beta_neg / 1.1  # the larger solution: a little less of it settles higher
            assert weaker * math.exp(-config.alpha * scale * (config.beta_rec * rec + weaker * kl)) > push / scale
    hopeless = SoftIntroVaeConfig(gamma=50.0).build(SHAPE)
    assert hopeless.settling_beta_neg(10.0) == pytest.approx(9.6)


def test_too_small_a_gap_moves_to_where_fakes_settle_above() -> None:
    wanted = SoftIntroVaeConfig().build(SHAPE).settling_beta_neg(6.0 + 2.0)
    weak = SoftIntroVaeConfig(beta_neg=1.0).build(SHAPE)
    live(control := controller(weak), 3, kl_real=6.0, kl_fake=4.0)
    assert weak.strength.value == 8.0  # no faster than the rate
    assert control.values() == {"controller/beta_neg": 8.0}
    live(control, 5, 6.0, 4.0, start=3000)
    assert weak.strength.value == pytest.approx(wanted)
    hopeless = SoftIntroVaeConfig(beta_neg=400.0).build(SHAPE)
    live(control := controller(hopeless), 2, 6.0, 4.0)
    assert hopeless.strength.value == 100.0
    live(control, 4, 6.0, 4.0, start=2000)
    assert hopeless.strength.value == pytest.approx(wanted)
    hinge = IntroVaeConfig(margin=3.0).build(SHAPE)
    live(control := controller(hinge), 1, 6.0, 4.0)
    assert control.values() == {"controller/margin": 6.0}
    live(control, 3, 6.0, 4.0, start=1000)
    assert hinge.strength.value == pytest.approx(6.0 + 2.0)


def test_the_strength_is_what_the_phases_use() -> None:
    from torch import nn

    from sivae_dist.models import Posterior
    from sivae_dist.models.mlp import MlpConfig
    from sivae_dist.objectives import Draws, Players

    model = MlpConfig.tiny().build()
    eps = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(model.encoder.layers.output.weight, generator=torch.Generator().manual_seed(1))

    def loss(objective: Any) -> float:
        players = Players(
            lambda x: Posterior(*model.encoder.layers(x).chunk(2, 1)),
            lambda z, name="", *, from_prior=False: model.decode(z),
            model.prior,
        )
        return float(objective.encoder_loss(players, eps, Draws(lambda name: eps), {}).loss.sum().detach())

    for config, field, value in (
        (SoftIntroVaeConfig(beta_neg=3.0), "beta_neg", 7.0),
        (IntroVaeConfig(margin=30.0), "margin", 70.0),
    ):
        moved = config.build((2,))
        before = loss(moved)
        moved.strength.value = value
        direct = type(config)(**{field: value}).build((2,))
        assert before != loss(moved) == loss(direct)


def test_a_wide_gap_and_the_bounds() -> None:
    objective = SoftIntroVaeConfig(beta_neg=1.0).build(SHAPE)
    live(controller(objective), 2, kl_real=4.0, kl_fake=9.0)
    assert objective.strength.value == 1.0
    live(controller(objective, min=0.2, max=3.0), 4, 4.0, 4.0)
    assert objective.strength.value == 3.0
    far = SoftIntroVaeConfig(beta_neg=1000.0).build(SHAPE)
    live(controller(far, min=200.0), 4, 4.0, 4.0)
    assert far.strength.value == 200.0


def test_no_fakes_or_disabled_moves_nothing() -> None:
    objective = SoftIntroVaeConfig(beta_neg=1.0).build(SHAPE)
    control = controller(objective)
    for nimg in range(250, 2001, 250):  # a warm-up
        control.after(IterationReport({("joint", "kl_real"): torch.tensor(5.0)}), nimg, 250)
    assert objective.strength.value == 1.0
    off = controller(objective, enabled=False)
    live(off, 3, 6.0, 4.0)
    assert (objective.strength.value, off.values(), off.state()) == (1.0, {}, {})


def test_state_resumes_in_the_middle_of_an_interval() -> None:
    whole, first = SoftIntroVaeConfig(beta_neg=1.0).build(SHAPE), SoftIntroVaeConfig(beta_neg=1.0).build(SHAPE)
    live(controller(whole), 2, 6.0, 4.0)
    control = controller(first)
    for nimg in (250, 500, 750, 1000, 1250):
        control.after(report(6.0, 4.0, 250), nimg, 250)
    state = json.loads(json.dumps(control.state()))
    again = SoftIntroVaeConfig(beta_neg=1.0).build(SHAPE)
    resumed = controller(again)
    resumed.load(state)
    assert resumed.state() == control.state()
    assert resumed.meters.counts["kl/fake"] == 250
    for nimg in (1500, 1750, 2000):
        resumed.after(report(6.0, 4.0, 250), nimg, 250)
    assert again.strength.value == whole.strength.value == 4.0
    resumed.load({})
    assert again.strength.value == 1.0


def test_what_cannot_be_controlled_is_told() -> None:
    with pytest.raises(UserError, match="Vae has nothing to adjust"):
        controller(VaeConfig().build(SHAPE))
    with pytest.raises(UserError, match="beta_neg is 0"):
        controller(SoftIntroVaeConfig(beta_neg=0.0).build(SHAPE))
    for wrong in (
        {"rate": 1.0},
        {"every_kimg": 0},
        {"min": 3.0, "max": 2.0},
        {"min": 0.0, "max": -1},
    ):
        with pytest.raises(UserError, match="controller"):
            ControllerConfig(**wrong)

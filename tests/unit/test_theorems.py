"""Soft-IntroVAE's and IntroVAE's equilibria on finite spaces, against the theorems' optima computed on their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sivae_dist.apps import theorems, theorems_report
from sivae_dist.apps.theorems import SoftGame

P = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_soft_introvae_reaches_the_minimiser_of_kl_and_entropy(gamma: float) -> None:
    """From random tables; the optimum satisfies its own first-order condition, and is p_data only for gamma 0."""
    r = theorems.soft_introvae(P, alpha=2.0, gamma=gamma, steps=300, seed=1)
    assert r.condition < 0  # the theorem speaks about this case
    slope = -P / r.optimum - gamma * (r.optimum.log() + 1)  # of KL + gamma H: constant over x at an optimum
    assert slope.max() - slope.min() < 1e-6
    assert r.distance < 1e-5
    assert r.objective[0] == pytest.approx(r.objective[1], abs=1e-9)
    assert r.posterior_gap < 1e-6
    assert max(r.gains) < 1e-9  # nobody leaves (posterior, optimum)
    assert (0.5 * float((r.optimum - P).abs().sum()) < 1e-6) == (gamma == 0)


def test_where_the_proviso_fails_the_posterior_is_left() -> None:
    r = theorems.soft_introvae(P, alpha=0.5, gamma=1.0, steps=150)
    assert r.condition > 0
    assert r.gains[0] > 1e-3


def test_elbo_is_below_the_log_likelihood_and_meets_it_at_the_posterior() -> None:
    random = torch.Generator().manual_seed(0)
    decoder, encoder = (torch.randn(4, 4, generator=random, dtype=torch.float64) for _ in range(2))
    game = SoftGame(P, alpha=2.0, gamma=1.0)
    log_p = game.p_d(decoder).log()
    assert torch.allclose(game.elbo(game.posterior(decoder), decoder), log_p)
    assert (game.elbo(encoder, decoder) < log_p).all()
    at = game.decoder_value(game.posterior(decoder), decoder)  # -KL(p_data || p_d) - H(p_data) - gamma H(p_d)
    entropy = -(P * P.log()).sum()
    assert torch.allclose(at, -game.theorem_objective(log_p.exp()) - entropy)


@pytest.mark.parametrize("margin", [0.5, 3.0])
def test_introvae_reaches_a_saddle_point(margin: float) -> None:
    h = theorems.introvae(P, margin=margin, steps=700)
    assert h.distance < 1e-6
    assert float(h.energy.max() - h.energy.min()) < 1e-5 * margin
    assert 0 <= float(h.energy.min()) <= float(h.energy.max()) <= margin
    assert abs(h.gap) < 1e-6
    assert h.circling > 0.05  # plain alternating steps do not arrive


def test_introvae_only_saddle_points_have_no_gap() -> None:
    """Both directions of the theorem, at points: any constant in [0, m] does, nothing else does."""
    other = torch.tensor([0.3, 0.4, 0.2, 0.1], dtype=torch.float64)
    constant = torch.ones(4, dtype=torch.float64)
    for level in (0.0, 0.7, 1.0):
        assert abs(theorems.saddle_gap(P, P, level * constant, 1.0)) < 1e-12
    assert theorems.saddle_gap(P, P, 1.2 * constant, 1.0) > 0.1
    assert theorems.saddle_gap(P, other, 0.5 * constant, 1.0) > 0.01
    assert theorems.saddle_gap(P, P, torch.tensor([0.5, 0.5, 0.5, 0.6], dtype=torch.float64), 1.0) > 0.01


def test_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theorems_report, "GAMMAS", (0.25,))
    monkeypatch.setattr(theorems_report, "MARGINS", (1.0,))
    text = theorems_report.report(tmp_path)
    assert "| 0.25 | yes |" in text
    assert (tmp_path / "theorems.png").is_file()

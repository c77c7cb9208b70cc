"""`suggest`: what it proposes follows from what it measures, and the config it writes trains."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import SMALL, sivae_dist

from sivae_dist.apps.suggest import LEAD, Measured, default_model, propose_hinge, propose_soft
from sivae_dist.cli.suggest import suggest
from sivae_dist.engine.config import from_dict, read_yaml
from sivae_dist.errors import UserError
from sivae_dist.objectives.soft_introvae import SoftIntroVaeConfig


def measured(**values: Any) -> Measured:
    base = {
        "nimg": 5000, "dimensions": 3072, "zdim": 128, "rec": 40.0, "rec_fake": 20.0, "kl_real": 20.0,
        "kl_real_q95": 30.0, "kl_rec": 18.0, "kl_fake": 19.0, "fakes_below_q95": 0.9,
    }  # fmt: skip
    return Measured(**{**base, **values})


def settles(beta_neg: float, m: Measured, beta_rec: float, beta_kl: float) -> float:
    """The KL at which push and pull on a fake are equal, found by trying (alpha = 2, gamma = 1)."""
    scale = 1 / m.dimensions
    found = [
        kl
        for kl in (0.01 * i for i in range(1, 200000))
        if beta_neg * math.exp(-2 * scale * (beta_rec * m.rec_fake + beta_neg * kl)) >= beta_kl
    ]
    return max(found, default=0.0)


@pytest.mark.parametrize(("kl", "beta_kl"), [(5.0, 1.0), (20.0, 1.0), (60.0, 0.5)])
def test_beta_neg_puts_the_balance_above_real_data(kl: float, beta_kl: float) -> None:
    m = measured(kl_real=kl)
    proposal = propose_soft(m, beta_rec=1.0, beta_kl=beta_kl)
    assert settles(proposal.objective["beta_neg"], m, 1.0, beta_kl) == pytest.approx(LEAD * kl, rel=0.05)
    assert not proposal.warnings
    # The published CIFAR-10 weights belong to a KL of about 33 / LEAD nats.
    published = propose_soft(measured(kl_real=33 / LEAD), beta_rec=1.0, beta_kl=1.0).objective["beta_neg"]
    assert published == pytest.approx(256, rel=0.05)


def test_what_no_beta_neg_can_do_is_said() -> None:
    proposal = propose_soft(measured(kl_real=2000.0), beta_rec=1.0, beta_kl=1.0)
    assert "no beta_neg makes fakes settle" in proposal.warnings[0]


def test_beta_neg_is_for_the_scale_of_the_run_to_be() -> None:
    """alpha, gamma and scale of the given objective decide where fakes settle, and the line that tells exp(ELBO)."""
    m = measured(kl_real=20.0)
    given = SoftIntroVaeConfig(alpha=1.0, gamma=0.5, scale=4 / m.dimensions)
    proposal = propose_soft(m, beta_rec=1.0, beta_kl=1.0, given=given)
    weights = replace(given, beta_rec=1.0, beta_kl=1.0, beta_neg=proposal.objective["beta_neg"])
    objective = weights.build((m.dimensions,))
    beta_neg, unit = weights.beta_neg, 1 / (weights.alpha * objective.scale)
    kl = (unit * math.log(beta_neg / weights.gamma) - m.rec_fake) / beta_neg  # where push and pull are equal
    assert kl == pytest.approx(LEAD * m.kl_real, rel=0.05)
    assert not proposal.warnings
    plain = propose_soft(m, beta_rec=1.0, beta_kl=1.0)
    assert plain.objective["beta_neg"] > 2 * proposal.objective["beta_neg"]
    with pytest.raises(UserError, match="alpha"):
        propose_soft(m, beta_rec=1.0, beta_kl=1.0, given=replace(given, alpha=0.0))


def test_a_growing_model_is_refused_before_the_warm_up(shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "growing.yaml"
    path.write_text("model: {name: style, image_size: 16}\nprogressive: {enabled: true}\n")
    with pytest.raises(UserError, match=r"(?s)growing model has a KL at each resolution.*progressive.enabled False"):
        suggest(str(shards), config=path, out=tmp_path / "new.yaml", run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_margin_lies_above_most_of_the_data() -> None:
    assert propose_hinge(measured(kl_real_q95=107.0), beta_rec=1.0, beta_kl=1.0).objective["margin"] == 120
    off = propose_hinge(measured(rec=4000.0), beta_rec=1.0, beta_kl=1.0)
    assert "--beta-rec 0.0082" in off.warnings[0]
    assert not propose_hinge(measured(rec=4000.0), beta_rec=0.0082, beta_kl=1.0).warnings


@pytest.mark.parametrize("objective", ["soft_introvae", "introvae"])
def test_the_written_config_trains(
    objective: Any, config: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "suggested.yaml"
    suggest(str(shards), config=config, objective=objective, out=out, images=200, run=tmp_path / "warm-up")
    said = capsys.readouterr().out
    for words in ("kl_real", "Soft-IntroVAE: objective:", "IntroVAE: objective:", "take what follows as rough"):
        assert words in said
    rows = [json.loads(line) for line in (tmp_path / "warm-up/metrics.jsonl").read_text().splitlines()]
    assert max(row["nimg"] for row in rows) == 200
    assert all("loss/joint" in row for row in rows if "lr/encoder" in row)  # the engine's own plain VAE
    text = out.read_text()
    assert "#   - beta_neg" in text
    assert "#   - margin" in text
    values = read_yaml(out)
    assert values["model"] == SMALL["model"]
    assert values["data"]["url"] == str(shards)
    assert values["objective"]["name"] == objective
    weight = values["objective"]["margin" if objective == "introvae" else "beta_neg"]
    assert weight > 0
    assert yaml.safe_load(text)["objective"][next(iter(values["objective"]))]
    from_dict(values, "test")
    run = tmp_path / "run"
    if objective == "introvae":
        done = sivae_dist("train", "--config", str(out), "--out", str(run), "--train.kimg", "0.1")
        assert done.returncode == 0, done.stderr
        assert json.loads((run / "summary.json").read_text())["finished"] is True


def test_without_a_config_the_network_fits_the_data(shards: Path) -> None:
    assert default_model(str(shards), 0.25) == {
        "image_size": 16, "channels_in": 3, "channels": [16, 32], "zdim": 32
    }  # fmt: skip


def test_bad_input_is_told(shards: Path, config: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.yaml"
    there.write_text("")
    for options, says in (
        ({"out": there}, "there already"),
        ({"out": tmp_path / "no/where.yaml"}, "no folder"),
        ({"images": -1}, "not all in range"),
        ({"minutes": 0.0}, "not all in range"),
        ({"beta_rec": -1.0}, "not all in range"),
        ({"config": tmp_path / "absent.yaml"}, "no config file"),
    ):
        with pytest.raises(UserError, match=says):
            suggest(str(shards), **{"out": tmp_path / "new.yaml", **options})
    with pytest.raises(UserError):
        suggest(str(tmp_path), out=tmp_path / "new.yaml")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("model: {image_size: 32, channels: [4, 8], zdim: 6}\n")
    with pytest.raises(UserError, match="3 x 16 x 16"):
        suggest(str(shards), config=wrong, out=tmp_path / "new.yaml")
    assert not (tmp_path / "new.yaml").exists()

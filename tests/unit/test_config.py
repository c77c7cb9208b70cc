from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sivae_dist.cli.train import parse
from sivae_dist.engine.config import RunConfig, from_dict, merge, read_yaml, to_dict, to_yaml
from sivae_dist.errors import UserError
from sivae_dist.objectives.introvae import IntroVaeConfig


def test_round_trip_through_yaml() -> None:
    config = from_dict({"objective": {"name": "introvae", "margin": 90}, "optim": {"encoder": {"lr": "1e-5"}}}, "test")
    assert isinstance(config.objective, IntroVaeConfig)
    assert config.optim.encoder.lr == 1e-5  # YAML reads 1e-5 as a text
    assert from_dict(yaml.safe_load(to_yaml(config)), "again") == config
    assert to_dict(from_dict(to_dict(config), "again")) == to_dict(config)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"modell": {}}, "no section 'modell'.*did you mean 'model'"),
        ({"train": {"bacth": 3}}, "no key train.bacth.*did you mean 'batch'"),
        ({"model": {"zdimm": 3}}, "no key model.zdimm.*did you mean 'zdim'"),
        ({"model": {"name": "residuall"}}, "residuall.*did you mean 'residual'"),
        ({"train": {"batch": "many"}}, "train.batch is 'many', expected a whole number"),
        ({"train": {"batch": True}}, "train.batch is True, expected a whole number"),
        ({"train": {"batch": 1.5}}, "train.batch is 1.5, expected a whole number"),
        ({"train": {"kimg": [1]}}, "train.kimg is .1., expected a number"),
        ({"train": 3}, "train is 3, expected keys and values"),
        ({"model": 3}, "model is 3, expected keys and values"),
        ({"model": {"channels": ["a"]}}, "model.channels is 'a', expected a whole number"),
        ({"precision": {"dtype": "fp61"}}, "precision.dtype is 'fp61', expected one of auto, fp32, bf16"),
        ({"train": {"batch": 0}}, "batch 0"),
        ({"optim": {"clip_norm": "big"}}, "optim.clip_norm is 'big', expected a number"),
        ({"optim": {"clip_norm": 0}}, r"optim.clip_norm is 0.0, expected a number > 0.*leave it out"),
        ({"optim": {"clip_norm": -1}}, r"optim.clip_norm is -1.0, expected a number > 0"),
        ({"optim": {"decay": 0}}, "decay must be positive"),
        ({"optim": {"warmup_kimg": -5}}, "warmup_kimg and the milestones 0 or more"),
        ({"optim": {"milestones_kimg": [5, -5]}}, "warmup_kimg and the milestones 0 or more"),
        ({"distributed": {"check": True}}, "distributed.check is True, expected one of off, start, checkpoints"),
    ],
)
def test_wrong_input_is_named(values: dict, says: str) -> None:
    with pytest.raises(UserError, match=f"(?s){says}"):
        from_dict(values, "test")


def test_base_file_lies_below(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {batch: 4, kimg: 7}\nobjective: {name: introvae, margin: 3}\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\ntrain: {batch: 8}\nobjective: {name: vae}\n")
    values = read_yaml(tmp_path / "top.yaml")
    assert values["train"] == {"batch": 8, "kimg": 7}
    assert values["objective"] == {"name": "vae"}  # another class: the base's margin would not fit
    (tmp_path / "third.yaml").write_text("base: top.yaml\n")
    with pytest.raises(UserError, match="one level"):
        read_yaml(tmp_path / "third.yaml")


def test_the_default_class_by_its_name_is_the_same_class(tmp_path: Path) -> None:
    """A file that names no class has the default one: to name that above it is no change, and loses nothing."""
    (tmp_path / "base.yaml").write_text("model: {zdim: 9}\nobjective: {beta_rec: 10}\ndata: {url: here}\n")
    names = "model: {name: residual}\nobjective: {name: soft_introvae, gamma: 0.5}\ndata: {name: shards}\n"
    (tmp_path / "top.yaml").write_text(f"base: base.yaml\n{names}")
    values = read_yaml(tmp_path / "top.yaml")
    assert (values["model"]["zdim"], values["objective"]["beta_rec"], values["data"]["url"]) == (9, 10, "here")
    arguments = ["--model.name", "residual", "--objective.name", "soft_introvae", "--data.name=shards"]
    config = ["--config", str(tmp_path / "base.yaml")]
    assert parse([*config, *arguments]).run == parse(config).run
    # Of another class nothing is taken over; a name within another section is a setting like any other.
    assert parse([*config, "--objective.name", "vae"]).run.objective.beta_rec == 1
    assert merge({"optim": {"decay": 0.5}}, {"optim": {"name": "lreq_adam"}})["optim"]["decay"] == 0.5


def test_words_that_yaml_takes_for_switches() -> None:
    config = from_dict(yaml.safe_load("distributed: {check: off}\nmodel: {name: style, noise: off}"), "test")
    assert (config.distributed.check, config.model.noise) == ("off", "off")
    run = parse(["--controller.enabled", "true", "--distributed.overlap=true", "--data.url", "true"]).run
    assert (run.controller.enabled, run.distributed.overlap, run.data.url) == (True, True, "true")
    assert not parse(["--controller.enabled=false"]).run.controller.enabled


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "not valid YAML"),
        ("[1, 2]", "holds a list"),
        ("!!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_bad_yaml_is_told(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        read_yaml(path)
    with pytest.raises(UserError, match="no config file"):
        read_yaml(tmp_path / "absent.yaml")


def test_command_line_over_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {batch: 4, kimg: 7}\nmodel: {zdim: 9}\n")
    arguments = ["--config", str(path), "--train.batch", "6", "--model.channels", "8", "16", "--ema.rampup", "0.5"]
    run = parse([*arguments, "--objective.name", "introvae", "--objective.margin=5"]).run
    assert (run.train.batch, run.train.kimg, run.model.zdim, run.model.channels) == (6, 7, 9, (8, 16))
    assert isinstance(run.objective, IntroVaeConfig)
    assert run.objective.margin == 5


def test_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(["--train.bacth", "3"])
    assert left.value.code == 2
    assert "--train.batch" in capsys.readouterr().err


def test_every_recipe_builds() -> None:
    folder = Path(__file__).parents[2] / "configs"
    for path in sorted(folder.rglob("*.yaml")):
        config = from_dict(read_yaml(path), str(path))
        assert isinstance(config, RunConfig)
        config.objective.build((3, 32, 32))

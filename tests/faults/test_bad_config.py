"""Wrong configurations, options and launcher settings, through the real command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import Runner, refused, write_config

# A few bytes whose full text would fill the memory: nine lists of nine lists of nine lists ...
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n"
LAUGHS += "".join(f"{c}: &{c} [{f'*{b}, ' * 9}]\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("modell: {zdim: 3}", "no section 'modell'"),
        ("model: {zdimm: 3}", "did you mean 'zdim'"),
        ("1: {a: 2}\nmodell: {}", "there is no section 1"),
        ("train: {batch: many}", "train.batch is 'many', expected a whole number"),
        ("train: []", "train is [], expected keys and values"),
        ("train: {batch: 10000000000000000000000}", "expected a whole number below 2^63"),
        ("train: {kimg: .inf}", "train.kimg is inf, expected a finite number"),
        ("optim: {encoder: {lr: .nan}}", "optim.encoder.lr is nan, expected a finite number"),
        ("model: {name: [residual]}", "model.name is ['residual'], expected a name"),
        ("model: {name: '../residual'}", "'../residual', which is not known"),
        ("train: {batch: 2001-99-99}", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("base: [1]", "base is [1], expected the name of a file"),
        ("base: /dev/zero", "is no file"),
        ("data: &d {name: shards, url: *d}", "expected a text"),
        ("train: &t {kimg: 1, batch: [*t]}", "train.batch is [{"),
        ("\x00", "not valid YAML"),
        (f"a: {'[' * 2000}", "nested too deeply"),
        (f"{LAUGHS}train: {{batch: *i}}", "no section 'a'"),
        (f"objective: {{\n{LAUGHS}beta_kl: *i}}".replace("]\n", "],\n"), "no key objective.a"),
        ("train: {batch: &b [&c [&d [1, 1, 1], *d, *d, *d], *c, *c, *c]}", "expected a whole number"),
    ],
)  # fmt: skip
def test_bad_file(run: Runner, tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    refused(run("train", "--config", path, "--out", tmp_path / "run", seconds=20), says)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "there is no config file"),
        (lambda path: path.mkdir(), "cannot read the config file"),
        (lambda path: path.write_bytes(b"\xff\xfe\xfa"), "cannot read the config file"),
        (lambda path: path.write_bytes(b"#" * 2_000_000), "more than 1048576 bytes"),
    ],
)
def test_unreadable_file(run: Runner, tmp_path: Path, make, says: str) -> None:
    make(tmp_path / "run.yaml")
    refused(run("train", "--config", tmp_path / "run.yaml"), says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--train.bacth", "3"], "--train.batch"),
        (["--train.batch", "x"], "invalid literal"),
        (["--train.batch", "0"], "batch 0"),
        (["--train.kimg", "inf"], "train.kimg is inf"),
        (["--train.seed", "9" * 30], "whole number below 2^63"),
        (["--model.name", "residuall"], "did you mean 'residual'"),
        (["--resume", "nowhere"], "cannot read the checkpoint nowhere"),
        (["--model.zdim", "99999999999"], "out of memory"),
        (["--data.lanes", "0"], "data.lanes is 0"),
        (["--data.workers", "100000"], "data.workers is 100000, expected 0 to 512"),
    ],
)
def test_bad_option(run: Runner, config: Path, tmp_path: Path, options: list[str], says: str) -> None:
    done = run("train", "--config", config, "--out", tmp_path / "run", *options)
    assert done.status == 2, done
    assert says in done.stderr, done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize("command", ["data packk", "", "trian", "evaluate", "data info", "doctor --nonsense"])
def test_bad_command(run: Runner, command: str) -> None:
    done = run(*command.split())
    assert done.status == (2 if command else 0), done
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed precision 'fp8'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', expected a whole number"),
        ({"WORLD_SIZE": "1", "RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "1", "RANK": "3"}, "RANK is 3 and WORLD_SIZE 1"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM"),
        ({"ACCELERATE_DYNAMO_BACKEND": "warp"}, "ACCELERATE_DYNAMO_BACKEND"),
        ({"ACCELERATE_USE_CPU": "perhaps"}, "ACCELERATE_USE_CPU"),
    ],
)
def test_bad_launcher_settings(run: Runner, config: Path, tmp_path: Path, env: dict[str, str], says: str) -> None:
    refused(run("train", "--config", config, "--out", tmp_path / "run", env=env), says)


def test_a_port_that_is_taken(run: Runner, config: Path, tmp_path: Path) -> None:
    """Without a launcher's store rank 0 opens the port itself."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = run("train", "--config", config, "--out", tmp_path / "run", env={**env, "ACCELERATE_USE_CPU": "true"})
    refused(done, f"MASTER_ADDR:MASTER_PORT = 127.0.0.1:{port}", "free there")


def test_a_folder_in_whose_place_a_file_lies(run: Runner, config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/run"):
        refused(run("train", "--config", config, "--out", out), "cannot write the run folder", "another place")
    few = ("--count", 4, "--val-count", 0, "--resolution", 16)
    refused(run("data", "scenes", tmp_path / "file", *few), "is a file, expected a folder")
    refused(run("data", "scenes", tmp_path / "file/x", *few), "cannot be made")
    assert (tmp_path / "file").read_text() == "mine"


def test_settings_reach_the_run(run: Runner, packed: Path, tmp_path: Path) -> None:
    """The guards above must not change what is right: numbers as texts, None, tuples."""
    config = write_config(tmp_path / "c.yaml", packed, optim={"encoder": {"lr": "1e-5"}, "clip_norm": None})
    done = run("train", "--config", config, "--print_config", "--optim.clip_norm", "2.5")
    assert done.status == 0, done
    assert "clip_norm: 2.5" in done.stdout and "lr: 1.0e-05" in done.stdout

"""launch/setup.sh: which Python it takes, what it says when something is missing, and that it installs only once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = ["accelerate", "deepspeed", "webdataset", "numpy", "tensorboard", "ninja", "tyro", "safetensors", "PIL"]
MODULES += ["yaml", "tqdm"]
TOOLS = ["bash", "cat", "dirname", "head", "mkdir", "rm", "env", "sed"]


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with the few programs the scripts need and nothing else: no Python, no compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return folder


def run(tools: Path, *command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        env={"PATH": str(tools), "HOME": str(tools), **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def shell(tools: Path, code: str, root: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """`code` in a shell that has sourced setup.sh of `root`."""
    return run(tools, "bash", "-c", f'set -euo pipefail; . "{root}/launch/setup.sh"; {code}', **env)


@pytest.mark.parametrize("command", ["launch/quickstart.sh", "tests/run.sh"])
def test_help_needs_nothing(tools: Path, command: str) -> None:
    done = run(tools, ROOT / command, "--help")
    assert done.returncode == 0
    assert "--offline" in done.stdout and "--python PY" in done.stdout


@pytest.mark.parametrize("command", ["launch/quickstart.sh", "tests/run.sh"])
def test_no_python_is_said_plainly(tools: Path, command: str) -> None:
    done = run(tools, ROOT / command)
    assert done.returncode == 1
    assert "error: no Python 3.11, 3.12 or 3.13 found" in done.stderr and "fix: install one" in done.stderr


def test_a_shim_that_fails_and_an_old_python_are_passed_over(tools: Path) -> None:
    script(tools / "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    script(tools / "python3.11", "exit 1")
    (tools / "python3").symlink_to(sys.executable)
    done = shell(tools, '_sivae_find_python; echo "$PY"')
    assert done.stdout.strip() == str(tools / "python3")


def test_a_python_without_venv_is_named(tools: Path) -> None:
    script(tools / "python3.11", f'case "$*" in *ensurepip*) exit 1;; esac; exec {sys.executable} "$@"')
    done = shell(tools, "sivae_setup test")
    assert done.returncode == 1
    assert f"{tools}/python3.11 cannot make virtual environments" in done.stderr and "python3-venv" in done.stderr


def test_a_missing_compiler_is_named(tools: Path) -> None:
    (tools / "python3").symlink_to(sys.executable)
    done = shell(tools, "sivae_setup test")
    assert done.returncode == 1
    assert "no C++ compiler found (tried c++, g++, clang++)" in done.stderr and "apt install g++" in done.stderr
    script(tools / "g++", "exit 0")
    assert shell(tools, "PY=python3 _sivae_check_compiler").returncode == 0
    assert "tried nosuch" in shell(tools, "PY=python3 _sivae_check_compiler", CXX="nosuch -O2").stderr


@pytest.mark.parametrize(
    ("value", "words"),
    [("/no/such/python", "there is no such command"), ("false", "not a working Python 3.11 to 3.13")],
)
def test_an_unusable_python_option_is_refused(tools: Path, value: str, words: str) -> None:
    (tools / "false").symlink_to(shutil.which("false") or "/bin/false")
    done = run(tools, ROOT / "tests/run.sh", "--python", value)
    assert done.returncode == 1 and words in done.stderr


def test_unknown_quickstart_option_is_refused(tools: Path) -> None:
    done = run(tools, ROOT / "launch/quickstart.sh", "--ouT", "x")
    assert done.returncode == 1 and "unknown option --ouT" in done.stderr


def bare_python(folder: Path) -> Path:
    """A Python that has nothing but its standard library and what lies in folder/site."""
    return script(folder / "bare", f'PYTHONPATH={folder}/site exec {sys.executable} -S "$@"')


def test_offline_names_what_is_missing(tools: Path, tmp_path: Path) -> None:
    done = run(tools, ROOT / "tests/run.sh", "--offline", "--python", bare_python(tmp_path))
    assert done.returncode == 1
    assert "lacks: torch, accelerate, deepspeed" in done.stderr and "pytest-timeout" in done.stderr


def test_offline_refuses_an_old_torch(tools: Path, tmp_path: Path) -> None:
    for name in (*MODULES, "pytest", "pytest_timeout", "hypothesis"):
        (tmp_path / "site" / name).mkdir(parents=True)
    (tmp_path / "site" / "torch.py").write_text("__version__ = '2.10.1+cu128'")
    python = bare_python(tmp_path)
    done = run(tools, ROOT / "tests/run.sh", "--offline", "--python", python)
    assert done.returncode == 1 and "torch 2.10.1+cu128, sivae-dist needs 2.11 or later" in done.stderr
    (tmp_path / "site" / "torch.py").write_text("__version__ = '2.11.0'")
    done = shell(tools, 'sivae_setup test; echo "$PY"', SIVAE_OFFLINE="1", SIVAE_PYTHON=str(python))
    assert done.stdout.strip() == str(python), done.stderr


@pytest.fixture
def project(tmp_path: Path, tools: Path) -> Path:
    """A copy of the set-up's files, and a Python whose virtual environments only write down what pip is told."""
    root = tmp_path / "project"
    (root / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch/setup.sh", root / "launch/setup.sh")
    for name in ("pyproject.toml", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, root / name)
    real = sys.executable
    inner = script(
        tmp_path / "inner",
        f'case "$*" in *"-m pip install"*) echo "$*" >>{tmp_path}/pip.log; [ ! -e {tmp_path}/broken ];; '
        f'*) exec {real} "$@";; esac',
    )
    script(
        tools / "python3.11",
        f'case "$*" in "-m venv"*) for last; do :; done; {shutil.which("mkdir")} -p "$last/bin"; '
        f'{shutil.which("cp")} {inner} "$last/bin/python";; *) exec {real} "$@";; esac',
    )
    script(tools / "c++", "exit 0")
    return root


def test_installs_once_and_again_only_when_something_changed(project: Path, tools: Path) -> None:
    log = project.parent / "pip.log"

    def installs(extra: str) -> list[str]:
        log.write_text("")
        done = shell(tools, f'sivae_setup {extra}; echo "$PY"', root=project)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(project / ".venv/bin/python")
        return [line for line in log.read_text().splitlines() if "-e" in line]

    assert installs("test") == ["-m pip install -c constraints.txt -e .[test]"]
    assert installs("test") == []
    assert installs("dev") == ["-m pip install -c constraints.txt -e .[dev]"]
    assert installs("test") == [], "dev contains test"
    with (project / "constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    assert len(installs("test")) == 1
    (project / ".venv/bin/python").unlink()
    assert len(installs("test")) == 1, "a broken environment is made anew"


def test_a_failed_installation_is_tried_again(project: Path, tools: Path) -> None:
    (project.parent / "broken").touch()
    done = shell(tools, "sivae_setup test", root=project)
    assert done.returncode == 1 and "pip could not install sivae-dist" in done.stderr
    (project.parent / "broken").unlink()
    assert "Setting up" in shell(tools, "sivae_setup test", root=project).stderr
    assert "Setting up" not in shell(tools, "sivae_setup test", root=project).stderr


def test_setup_options_reach_the_set_up(tools: Path) -> None:
    code = 'sivae_option "$@"; echo "$SIVAE_SHIFT ${SIVAE_PYTHON:-} ${SIVAE_OFFLINE:-}"'
    for words, shown in {
        "--python a b": "2 a",
        "--python=a b": "1 a",
        "--offline": "1  1",
        "-k x": "0",
        "": "0",
    }.items():
        assert shell(tools, f"set -- {words}; {code}").stdout.strip() == shown
    assert os.access(ROOT / "launch/quickstart.sh", os.X_OK)


def test_quickstart_says_and_does_three_steps(tools: Path, tmp_path: Path) -> None:
    """With a Python that only writes down what it is asked to run."""
    log, out = tmp_path / "commands", tmp_path / "a run"
    python = script(tmp_path / "python", f'case "$1" in -m) echo "$*" >>"{log}";; esac')

    def quickstart() -> tuple[list[str], str]:
        log.write_text("")
        options = ["--offline", "--python", python, "--out", out, "--", "--train.kimg", "2"]
        done = run(tools, ROOT / "launch/quickstart.sh", *options)
        assert done.returncode == 0, done.stderr
        return log.read_text().splitlines(), done.stderr

    commands, said = quickstart()
    assert [line.split("  ")[0] for line in said.splitlines() if line[:1].isdigit()] == ["1/3", "2/3", "3/3"]
    data, train, evaluate = commands
    assert data.startswith(f"-m sivae_dist data scenes {out}-data ")
    assert "--config_file launch/accelerate/single.yaml -m sivae_dist.train --config configs/quickstart.yaml" in train
    assert train.endswith(f"--out {out} --data.url {out}-data --train.kimg 2")
    assert evaluate == f"-m sivae_dist evaluate {out}"
    Path(f"{out}-data").mkdir()
    Path(f"{out}-data/manifest.json").write_text("{}")
    (out / "samples").mkdir(parents=True)
    for number, name in enumerate(("z.png", "a.png")):
        (out / "samples" / name).touch()
        os.utime(out / "samples" / name, (number, number))
    commands, said = quickstart()
    assert commands == [train, evaluate], "data that are there are not drawn again"
    assert f"newest picture: {out}/samples/a.png" in said


@pytest.mark.parametrize("status", [0, 1])
def test_ctrl_c_waits_for_the_training_and_stops_there(tools: Path, tmp_path: Path, status: int) -> None:
    """Ctrl-C reaches every process of the terminal; this training saves for a moment before it ends."""
    log = tmp_path / "commands"
    training = (
        "import pathlib, signal, sys, time; asked = []; signal.signal(signal.SIGINT, lambda *_: asked.append(1)); "
        f"log = pathlib.Path({str(log)!r}); log.write_text('training'); t = time.monotonic()\n"
        "while not asked and time.monotonic() - t < 60: time.sleep(0.02)\n"
        f"time.sleep(0.3); log.write_text('saved'); sys.exit({status})"
    )
    (tmp_path / "training.py").write_text(training)
    body = f'case "$*" in *sivae_dist.train*) exec {sys.executable} {tmp_path}/training.py;; '
    python = script(tmp_path / "python", body + f'*evaluate*) echo evaluated >"{log}";; esac')
    process = subprocess.Popen(
        [ROOT / "launch/quickstart.sh", "--offline", "--python", python, "--out", tmp_path / "run"],
        env={"PATH": str(tools)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_text() != "training":
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "The same command goes on" in said
    assert log.read_text() == "saved"


def test_a_whole_fast_run_takes_two_processes(tools: Path, tmp_path: Path) -> None:
    """With a Python that only writes down what it is asked to run, and that has pytest-xdist or not."""
    log = tmp_path / "commands"
    python = script(tmp_path / "python", f'case "$*" in *xdist*) exit "$NONE";; -m*) echo "$*" >>"{log}";; esac')
    nproc = script(tools / "nproc", "echo 2")

    def asked(*options: str, none: str = "0") -> str:
        log.write_text("")
        done = run(tools, ROOT / "tests/run.sh", "--offline", "--python", python, *options, NONE=none)
        assert done.returncode == 0, done.stderr
        assert ("has no pytest-xdist" in done.stderr) == (none == "1")
        return log.read_text().strip()

    fast, both = "-m pytest -m not slow and not gpu", " -n 2 --no-loadscope-reorder"
    assert asked() == fast + both
    assert asked(none="1") == fast
    assert asked("-k", "shards") == f"{fast} -k shards"
    assert asked("--jobs", "2", "-k", "shards") == f"{fast}{both} -k shards"
    assert asked("--jobs=1") == fast
    assert asked("--slow") == "-m pytest -m slow and not gpu"
    script(nproc, "echo 1")
    assert asked() == fast
    for wrong in (["--jobs"], ["--jobs", "two"], ["--jobs=0"]):
        done = run(tools, ROOT / "tests/run.sh", *wrong)
        assert done.returncode == 1 and "expected a number of processes" in done.stderr

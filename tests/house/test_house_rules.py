"""The house rules hold, and each rule is shown to catch what it forbids."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import house_rules as rules
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LONGEST_FILE = 400
# Spelled in pieces, or this file would contain them.
PRIVATE_PATHS = ["/" + "work/", "/" + "root/"]


def tree(folder: Path, files: dict[str, str]) -> Path:
    """A package below `folder`: {"room/module": text}."""
    for name, text in files.items():
        path = folder / "sivae_dist" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_imports_run_one_way() -> None:
    assert len(rules.python_files(ROOT)) > 10
    assert not rules.import_violations(ROOT)


def test_bars_have_the_lock_of_their_process() -> None:
    """See sivae_dist/progress.py."""
    paths = rules.python_files(ROOT)
    using = [
        p.name for p in paths if any(n.split(".")[0] == "tqdm" for _, n in rules.imported(rules.parse(p), p, ROOT))
    ]
    assert using == ["progress.py"]


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"ops/conv": "from sivae_dist.models import base"}, "ops imports sivae_dist.models.base, which lies above"),
        ({"errors": "import sivae_dist.ops"}, "errors imports sivae_dist.ops, which lies above"),
        ({"resources": "def f():\n    from sivae_dist.engine import trainer"}, "resources.py:2: resources imports"),
        ({"models/a": "from sivae_dist.engine.config import X"}, "models imports sivae_dist.engine.config.X"),
        ({"models/a": "from ..engine import trainer"}, "models imports sivae_dist.engine.trainer"),
        ({"models/style/a": "from ...engine.phase import Phase"}, "models imports sivae_dist.engine.phase.Phase"),
        ({"models/a": "from sivae_dist import cli"}, "models imports sivae_dist.cli"),
        ({"models/a": "import sivae_dist"}, "models imports sivae_dist"),
        ({"engine/a": "from sivae_dist import load"}, "which has no layer"),
        ({"apps/a": "from sivae_dist.train import main"}, "apps imports sivae_dist.train.main"),
        ({"objectives/a": "import numpy"}, "objectives import only torch and the standard library"),
        ({"objectives/a": "from sivae_dist.errors import UserError"}, "nothing of ours but each other"),
        ({"objectives/__init__": "from sivae_dist.models import base"}, "nothing of ours but each other"),
        ({"distributed/a": "from sivae_dist.models import base"}, "distributed knows no VAE"),
        ({"distributed/a": "from sivae_dist.objectives import vae"}, "distributed knows no VAE"),
        ({"distributed/a": "from sivae_dist.data.plan import Plan"}, "distributed knows no VAE"),
        ({"distributed/a": "from sivae_dist.engine.phase import Phase"}, "distributed knows no VAE"),
        ({"cellar/a": ""}, "no layer is known for 'cellar'"),
        (
            {"models/a": "import sivae_dist.data.plan", "data/b": "from sivae_dist.models import base"},
            "circle: data -> models -> data",
        ),
    ],
)
def test_import_rule_catches(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    found = rules.import_violations(tree(tmp_path, files))
    assert any(complaint in line for line in found), found


def test_import_rule_lets_pass(tmp_path: Path) -> None:
    files = {
        "cli/main": "from sivae_dist.engine import trainer\nfrom sivae_dist.errors import UserError",
        "engine/trainer": "from sivae_dist import __version__\nfrom sivae_dist.models import base\nimport accelerate",
        "models/base": "from sivae_dist.models.posterior import P\nfrom . import a\nfrom sivae_dist.ops import conv",
        "interop/read": "from sivae_dist.models import base",
        "objectives/base": "import math\nimport torch.nn\nfrom . import terms\nfrom sivae_dist.objectives.a import T",
        "distributed/a": "from sivae_dist.errors import UserError\nimport torch\nimport accelerate",
    }
    assert not rules.import_violations(tree(tmp_path, files))


def test_files_can_be_read_in_one_sitting() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in rules.python_files(ROOT)}
    assert not {str(path): n for path, n in lengths.items() if n > LONGEST_FILE}


def test_nothing_that_is_read_can_run() -> None:
    found = {str(path): rules.unsafe_uses(rules.parse(path)) for path in rules.python_files(ROOT)}
    assert not {path: bad for path, bad in found.items() if bad}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import os, marshal",
        "from torch import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "from os import system",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=flag)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.unsafe_load(text)",
    ],
)
def test_safety_rule_catches(line: str) -> None:
    assert rules.unsafe_uses(ast.parse(line))


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, map_location='cpu', weights_only=True)",
        "model.eval()",
        "yaml.safe_load(text)",
        "np.load(path, allow_pickle=False)",
        "subprocess.run([name], shell=False)",
        "json.load(file)",
    ],
)
def test_safety_rule_lets_pass(line: str) -> None:
    assert not rules.unsafe_uses(ast.parse(line))


def test_every_process_group_has_a_timeout() -> None:
    found = {str(path): rules.groups_without_timeout(rules.parse(path)) for path in rules.python_files(ROOT)}
    assert not {path: bad for path, bad in found.items() if bad}


@pytest.mark.parametrize(
    "line",
    [
        "dist.new_group()",
        "new_group(backend='gloo')",
        "torch.distributed.init_process_group('gloo', rank=0, world_size=1)",
        "dist.new_subgroups_by_enumeration([[0], [1]])",
        "init_device_mesh('cpu', (2, 2))",
    ],
)
def test_timeout_rule_catches(line: str) -> None:
    assert rules.groups_without_timeout(ast.parse(line))


def test_timeout_rule_lets_pass() -> None:
    assert not rules.groups_without_timeout(ast.parse("dist.new_group(timeout=t); DeviceMesh.from_group(group, 'cpu')"))


def test_no_ambiguous_names() -> None:
    found = {str(path): rules.ambiguous_names(rules.parse(path)) for path in rules.python_files(ROOT)}
    assert not {path: bad for path, bad in found.items() if bad}


@pytest.mark.parametrize(
    "line",
    ["D = 1", "self.G(z)", "def f(netD): ...", "import decoder as D", "class G: ...", "def netG(): ...", "f(D=1)"],
)
def test_name_rule_catches(line: str) -> None:
    assert rules.ambiguous_names(ast.parse(line))


def test_name_rule_lets_pass() -> None:
    assert not rules.ambiguous_names(ast.parse("d = G_BCHW + self.decoder(D2)  # D and G in a comment\ntext = 'D'"))


def test_no_private_paths(tmp_path: Path) -> None:
    files = rules.project_files(ROOT)
    assert Path(__file__).resolve() in files
    assert not rules.mentions(files, PRIVATE_PATHS)
    probe = tmp_path / "probe.md"
    probe.write_text(f"see {PRIVATE_PATHS[0]}notes")
    assert rules.mentions([probe], PRIVATE_PATHS)


def test_readme_opens_with_two_commands_that_run() -> None:
    block = re.search(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert block is not None
    commands = [line.split("#")[0].strip() for line in block[1].splitlines() if line.strip()]
    assert commands == ["./launch/quickstart.sh", "./tests/run.sh"]
    for script in [*commands, ".ci/run"]:
        assert os.access(ROOT / script, os.X_OK), f"{script} is not executable"


def yaml_files() -> list[Path]:
    return sorted([*(ROOT / "configs").rglob("*.y*ml"), *(ROOT / "launch").rglob("*.y*ml")])


@pytest.mark.parametrize("path", yaml_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_yaml_parses_to_a_mapping(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)

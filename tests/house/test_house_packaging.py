"""What pip builds and installs: one top-level package that carries its recipes and kernels."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from sivae_dist import resources
from sivae_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt", "CHANGELOG.md"]
FOLDERS = ["sivae_dist", "configs", "kernels", "launch"]
# Always there, whatever the checkout holds: files two levels deep, and one that must stay behind.
PROBES = {"kernels/probe/probe.cu": "// probe", "configs/probe.yaml": "a: 1"}
HIDDEN = "kernels/probe/.build/left.o"


def checkout(folder: Path) -> Path:
    """A copy of what a build reads, without the caches and build folders of the real checkout."""
    folder.mkdir()
    for name in PARTS:
        shutil.copy(ROOT / name, folder / name)
    for name in FOLDERS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in {**PROBES, HIDDEN: "x"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Standard output of a command that must succeed."""
    words = [str(part) for part in command]
    environment = {**os.environ, **env}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout(tmp_path_factory.mktemp("packaging") / "checkout")


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    target = source.parent / "wheels"
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    run(*pip, "--wheel-dir", target, source, cwd=source.parent)
    (built,) = target.glob("*.whl")
    return built


def test_wheel_has_one_top_level_package_with_everything_inside(source: Path, wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"sivae_dist", "sivae_dist-0.1.0.dist-info"}
    for folder in ("configs", "kernels"):
        inside = {n.removeprefix(f"sivae_dist/_{folder}/") for n in names if n.startswith(f"sivae_dist/_{folder}/")}
        beside = {p.relative_to(source / folder).as_posix() for p in (source / folder).rglob("*") if p.is_file()}
        assert inside == {name for name in beside if "/." not in f"/{name}"}
    modules = {p.relative_to(source).as_posix() for p in (source / "sivae_dist").rglob("*.py")}
    assert modules <= set(names) and "sivae_dist/py.typed" in names
    assert not any("left.o" in name for name in names)


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read("sivae_dist-0.1.0.dist-info/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata and "License-File: LICENSE" in metadata
    assert set(re.search(r"Requires-Python: (.*)", metadata)[1].split(",")) == {">=3.11", "<3.14"}  # type: ignore[index]
    entry = archive.read("sivae_dist-0.1.0.dist-info/entry_points.txt").decode()
    assert "sivae-dist = sivae_dist.cli:main" in entry


def test_source_distribution_carries_what_the_wheel_needs(source: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    run(sys.executable, "-c", code, cwd=source)
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*PROBES, *PARTS, "launch/setup.sh", "sivae_dist/resources.py"} <= names


def test_installed_copy_finds_its_own_folders(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    # An installed package called `kernels` exists on PyPI and must not be taken for ours.
    (target / "kernels").mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    run(*pip, "--target", target, wheel, cwd=tmp_path)
    code = "from sivae_dist import resources as r; print(r.__file__, r.configs_dir(), r.kernels_dir(), sep='\\n')"
    printed = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target)).split()
    package = target / "sivae_dist"
    assert [Path(line) for line in printed] == [package / "resources.py", package / "_configs", package / "_kernels"]
    assert (package / "_kernels/probe/probe.cu").read_text() == PROBES["kernels/probe/probe.cu"]


def test_checkout_finds_the_sibling(tmp_path: Path) -> None:
    for name in ("sivae_dist", "kernels"):
        (tmp_path / name).mkdir()
    package = tmp_path / "sivae_dist"
    with pytest.raises(UserError, match=r"kernels/ of sivae-dist is missing[\s\S]*fix: "):
        resources._folder("kernels", package)
    (tmp_path / "pyproject.toml").write_text("")
    assert resources._folder("kernels", package) == tmp_path / "kernels"
    (package / "_kernels").mkdir()
    assert resources._folder("kernels", package) == package / "_kernels"


def test_this_checkout_has_recipes() -> None:
    assert any(resources.configs_dir().glob("*.yaml"))


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=~! ]", line)[0].lower().replace("_", "-") for line in requirements}


def test_every_requirement_is_pinned_and_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][\w.]*", line) for line in lines)
    assert lines == sorted(set(lines), key=lambda line: line.split("==")[0])
    direct = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    assert names_of(direct) - {"sivae-dist"} <= names_of(lines)
    readme = (ROOT / "README.md").read_text()
    assert not {name for name in names_of(project["dependencies"]) if f"| {name} |" not in readme}

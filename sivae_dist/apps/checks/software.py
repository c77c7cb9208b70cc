"""Python, packages, compilers."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import sysconfig
import time
import tomllib
from importlib import metadata
from pathlib import Path

from sivae_dist.apps.checks.base import Check, command_output, ok, problem, warning

# distribution -> module; what every run imports.
REQUIRED = {
    "torch": "torch",
    "accelerate": "accelerate",
    "numpy": "numpy",
    "tyro": "tyro",
    "safetensors": "safetensors.torch",
    "pillow": "PIL.Image",
    "pyyaml": "yaml",
    "tqdm": "tqdm",
}
OPTIONAL = {
    "tensorboard": ("torch.utils.tensorboard", "set tracking.tensorboard to False, or pip install tensorboard"),
    "webdataset": ("webdataset", "pip install webdataset, if other programs are to read the shards through it"),
}
STALE_S = 600.0
_INSTALL = "pip install sivae-dist, or in a checkout: pip install -c constraints.txt -e ."


def python() -> list[Check]:
    """The interpreter."""
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < (3, 11) or sys.version_info >= (3, 14):
        return [problem("python", f"{found}, expected 3.11 to 3.13", "make an environment with such a Python")]
    return [ok("python", found)]


def packages() -> list[Check]:
    """Every package is imported for real: a broken one often looks installed."""
    ranges = _ranges()
    found = []
    for name, module in [*REQUIRED.items(), *((name, module) for name, (module, _) in OPTIONAL.items())]:
        remedy = OPTIONAL[name][1] if name in OPTIONAL else f"pip install {name} ({_INSTALL} installs all)"
        grade = warning if name in OPTIONAL else problem
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken package may raise anything
            text = " ".join(str(error).split())[:200]
            found.append(grade(name, f"cannot be imported: {type(error).__name__}: {text}", remedy))
            continue
        version = _version(name)
        if outside := _outside(version, ranges.get(name)):
            found.append(warning(name, f"{version}, tested with {outside}", f"pip install '{name}{outside}'"))
        else:
            found.append(ok(name, version))
    return found


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown version"


def _ranges() -> dict[str, str]:
    """Version ranges of our dependencies, as the checkout or the installed package states them."""
    project = Path(__file__).resolve().parents[3] / "pyproject.toml"
    try:
        lines = tomllib.loads(project.read_text())["project"]["dependencies"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        try:
            lines = [line for line in metadata.requires("sivae-dist") or [] if "extra ==" not in line]
        except metadata.PackageNotFoundError:
            return {}
    pairs = (_split(line) for line in lines)
    return {name.lower(): versions for name, versions in pairs if versions}


def _split(requirement: str) -> tuple[str, str]:
    end = next((i for i, c in enumerate(requirement) if c in "<>=!~; "), len(requirement))
    return requirement[:end], requirement[end:].split(";", maxsplit=1)[0].strip()


def _outside(version: str, versions: str | None) -> str:
    """The range when the version is outside of it, else ""."""
    try:
        from packaging.specifiers import SpecifierSet  # noqa: PLC0415 (comes with accelerate)

        inside = versions is None or SpecifierSet(versions, prereleases=True).contains(version)
    except Exception:
        return ""
    return "" if inside else versions or ""


def compilers() -> list[Check]:
    """C++ compiler, nvcc, ninja: what building kernels needs. Without them the reference implementations run."""
    slower = "operations use their reference implementations"
    found = []
    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "c++")
    include = Path(sysconfig.get_paths()["include"]) / "Python.h"
    told = command_output(compiler, "--version")
    works = command_output(compiler, "-x", "c++", "-std=c++17", "-fsyntax-only", "-", text="#include <vector>\n")
    if told is None or works is None:
        what = f"{compiler} {'cannot compile a file' if told else 'is not found'}; {slower}"
        found.append(warning("c++ compiler", what, "install one (apt install g++), or set CXX to a working one"))
    elif not include.is_file():
        remedy = "install them (apt install python3-dev)"
        found.append(warning("c++ compiler", f"{include} is missing, so torch.compile cannot serve CPUs", remedy))
    else:
        found.append(ok("c++ compiler", told.splitlines()[0]))
    nvcc, cuda = command_output("nvcc", "--version"), _torch_cuda()
    if nvcc is not None:
        found.append(ok("nvcc", next((x for x in nvcc.splitlines() if "release" in x), nvcc.splitlines()[0]).strip()))
    elif cuda:
        remedy = f"install the CUDA {cuda} toolkit and put its bin folder on PATH"
        found.append(warning("nvcc", f"is not found; {slower} on the GPU", remedy))
    else:
        found.append(ok("nvcc", "is not found, and this torch has no CUDA to need it for"))
    ninja = command_output("ninja", "--version")
    remedy = "pip install ninja, and keep the environment's bin folder on PATH"
    missing = warning("ninja", f"is not found, so kernels cannot be built; {slower}", remedy)
    found.append(ok("ninja", ninja.strip()) if ninja else missing)
    return found


def _torch_cuda() -> str | None:
    try:
        import torch  # noqa: PLC0415
    except Exception:
        return None
    version: str | None = torch.version.cuda
    return version


def extension_locks() -> list[Check]:
    """Locks of torch's own extension builder (DeepSpeed uses it) that a killed build left: later ones wait for ever."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    stale = [p for p in root.glob("**/lock") if p.is_file() and time.time() - p.stat().st_mtime > STALE_S]
    if stale:
        listed = " ".join(map(str, stale[:5]))
        what = (
            f"{len(stale)} locks older than {STALE_S / 60:.0f} minutes: a build was killed, and later ones hang on it"
        )
        return [problem("extension locks", f"{what} ({listed})", f"when no build is running: rm {listed}")]
    return [ok("extension locks", f"none left behind in {root}")]


def deepspeed() -> list[Check]:
    """Whether DeepSpeed can be imported, in a process of its own: it may print, build or crash."""
    if importlib.util.find_spec("deepspeed") is None:
        return [ok("deepspeed", "is not installed; the strategies ddp and fsdp2 do without it")]
    code = "import deepspeed; print('version', deepspeed.__version__)"
    told = command_output(sys.executable, "-W", "ignore", "-c", code, seconds=120)
    if told is None:
        what = "is installed but cannot be imported within 120 s"
        return [warning("deepspeed", what, "pip install --force-reinstall deepspeed; the strategy ddp does without it")]
    version = next((line.split()[1] for line in told.splitlines() if line.startswith("version ")), "?")
    return [ok("deepspeed", f"{version}; needs neither accelerate's plugin nor transformers, and builds nothing")]

"""What a build of the kernels is made from: compilers, flags, sources. Two builds with the same key are the same."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sivae_dist.errors import UserError
from sivae_dist.resources import kernels_dir

Device = Literal["cpu", "cuda", "emulated"]
SOURCES: dict[Device, str] = {"cpu": "*/*_cpu.cpp", "cuda": "*/*.cu", "emulated": "*/*.cu"}
ARCHITECTURES = "80;90+PTX"  # built ahead of time, and where no device says otherwise
_CODE = re.compile(r"code=(?P<kind>sm|compute)_(?P<major>\d+)(?P<minor>\d)(?P<only>[af]?)")
_LAUNCHERS = {"ccache", "sccache", "distcc", "icecc"}  # what stands before a compiler and is none
_OLDEST, _NEWEST = (2, 11), (2, 13)  # versions of torch's stable interface that the sources are written for


class UnavailableError(Exception):
    """The kernels cannot be had: why, in one line, and what to do about it."""

    def __init__(self, why: str, fix: str) -> None:
        super().__init__(why)
        self.why, self.fix = why, fix


@dataclass(frozen=True)
class Recipe:
    """All inputs of one build."""

    device: Device
    compiler: tuple[str, ...]
    """The command that compiles: a C++ compiler, or nvcc."""
    version: str
    """What the compiler calls itself."""
    flags: tuple[str, ...]
    link: tuple[str, ...]
    root: Path
    """The folder of the sources."""
    ninja: str
    module: bool = False
    """Whether Python can import the library, too."""

    @property
    def sources(self) -> list[Path]:
        """The files to compile, one object each."""
        module = [self.root / "common/module.cpp"] if self.module else []
        return [*sorted(self.root.glob(SOURCES[self.device])), *module]

    @functools.cached_property
    def facts(self) -> dict[str, str]:
        """What the key is made of, for the build's record and the run's manifest."""
        return {
            "device": self.device,
            "sources": digest(self.root),
            "torch": torch.__version__,
            "cuda": str(torch.version.cuda),
            "compiler": f"{' '.join(self.compiler)}: {self.version}",
            "flags": " ".join(self.flags),
            "link": " ".join(self.link),
            "processor": _processor() if "-march=native" in self.flags else platform.machine(),
        }

    @property
    def key(self) -> str:
        """A hash of everything that shapes the result."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]


def digest(root: Path) -> str:
    """A hash of all sources and headers below a folder: names and contents."""
    total = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in {".h", ".cuh", ".cpp", ".cu"}:
            total.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
            total.update(path.read_bytes())
    return total.hexdigest()[:16]


def recipe(device: Device, *, ahead: bool = False) -> Recipe:
    """How to build for `device` here. ahead: as `sivae_dist._C`, for any processor of this kind.

    Raises UnavailableError when a part is missing: sources, compiler, ninja, toolkit.
    """
    try:
        root = kernels_dir()
    except UserError as error:
        raise UnavailableError(error.what, error.fix) from error
    include = Path(torch.__file__).parent / "include"
    python = [f"-I{sysconfig.get_paths()['include']}"] if ahead else []
    common = [
        *python,
        f"-I{root}",
        "-isystem",
        str(include),
        f"-DTORCH_TARGET_VERSION={_target()}",
        "-std=c++20",
        "-O3",
    ]
    library = str(Path(torch.__file__).parent / "lib")
    link = ["-shared", f"-L{library}", "-ltorch_cpu", "-lc10"]
    cxx = tuple(cxx_command())
    if device == "cuda":
        nvcc, toolkit = nvcc_command()
        host = host_words(cxx)
        strict = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror", "-Werror", "all-warnings"]
        strict += ["-Xptxas", "-v", "--expt-relaxed-constexpr", "-lineinfo"]
        flags = [*common, *host, *strict, *_gencode(ahead=ahead)]
        link = [*host, *link, "-cudart", "shared", "-Xlinker", f"-rpath,{toolkit / 'lib64'}"]
        if torch.version.cuda is not None:
            link += ["-ltorch_cuda"]
        return Recipe(device, (nvcc,), _version((nvcc,)), tuple(flags), tuple(link), root, ninja_command(), ahead)
    # Errno and traps of the C library's functions are nobody's business here; NaN and infinity are.
    fast = [
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    tuned = [] if ahead else ["-march=native"]
    if device == "emulated":
        fast += ["-O1", "-DSIVAE_EMULATED", "-U_FORTIFY_SOURCE", "-x", "c++", "-Wno-unknown-pragmas", "-Wno-clobbered"]
    return Recipe(device, cxx, _version(cxx), (*common, *fast, *tuned), tuple(link), root, ninja_command(), ahead)


def cxx_command() -> list[str]:
    """The C++ compiler as words: $CXX, else c++, g++ or clang++. Raises UnavailableError when none runs."""
    given = os.environ.get("CXX")
    words = shlex.split(given) if given else [next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "c++")]
    if not words or shutil.which(words[0]) is None:
        raise UnavailableError(
            f"there is no C++ compiler ({given or 'c++, g++, clang++'} is not found)",
            "install one (Debian, Ubuntu: apt install g++), or set CXX to a working one",
        )
    return words


def host_words(cxx: tuple[str, ...]) -> list[str]:
    """nvcc's words for the C++ compiler that does the host's part of compiling, and links.

    -ccbin takes one word: launchers before the compiler are left out, its own flags follow as -Xcompiler. Raises
    UnavailableError when no compiler follows a launcher.
    """
    compiler, *flags = itertools.dropwhile(lambda word: Path(word).name in _LAUNCHERS, (*cxx, ""))
    if shutil.which(compiler) is None:
        what = f"{compiler} is not found" if compiler else f"{' '.join(cxx)} is none"
        raise UnavailableError(f"there is no C++ compiler for nvcc ({what})", "set CXX to a working one")
    words = ["-ccbin", compiler]
    for flag in flags[:-1]:  # nvcc splits at commas, and its shell at blanks
        words += ["-Xcompiler", shlex.quote(flag).replace(",", "\\,")]
    return words


def nvcc_command() -> tuple[str, Path]:
    """(nvcc, the toolkit's folder). Raises UnavailableError when there is none, or one of another CUDA than torch's."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            candidates = [str(Path(os.environ[name]) / "bin/nvcc")]
            break
    else:
        candidates = ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next((path for c in candidates if (path := shutil.which(c))), None)
    wanted = torch.version.cuda
    remedy = f"install the CUDA {wanted or 'toolkit'} (nvcc) and put its bin folder on PATH, or set CUDA_HOME"
    if nvcc is None:
        raise UnavailableError(f"nvcc is not found (tried {', '.join(candidates)})", remedy)
    toolkit = Path(nvcc).resolve().parents[1]
    if not (toolkit / "include/cuda_runtime.h").is_file():  # a wrapper script, for instance
        named = [Path(os.environ.get(n, "")) for n in ("CUDA_HOME", "CUDA_PATH")] + [Path("/usr/local/cuda")]
        toolkit = next((p for p in named if (p / "include/cuda_runtime.h").is_file()), toolkit)
    release = next((w for w in _version((nvcc,)).replace(",", " ").split() if w.startswith("V")), "V0")
    if wanted is not None and release[1:].split(".", maxsplit=1)[0] != wanted.split(".", maxsplit=1)[0]:
        raise UnavailableError(f"{nvcc} is of CUDA {release[1:]}, this torch of CUDA {wanted}", remedy)
    return nvcc, toolkit


def ninja_command() -> str:
    """The ninja beside this Python or on the PATH. Raises UnavailableError when there is none."""
    beside = Path(sys.executable).parent / "ninja"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("ninja")
    if found is None:
        raise UnavailableError("ninja is not found", "pip install ninja")
    return found


def _version(command: tuple[str, ...]) -> str:
    """The line that names the version. Raises UnavailableError when the compiler does not start."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise UnavailableError(
            f"{command[0]} does not start: {error}", "install a working compiler, or set CXX"
        ) from error
    lines = done.stdout.strip().splitlines() or ["?"]
    return next((line for line in lines if "release" in line), lines[0]).strip()


def _target() -> str:
    """The version of torch's stable interface to compile for, as its headers want it."""
    major, minor = (int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if (major, minor) < _OLDEST:
        raise UnavailableError(f"torch {torch.__version__} is too old", "pip install 'torch>=2.11'")
    major, minor = min((major, minor), _NEWEST)
    return f"0x{major:02x}{minor:02x}000000000000"


def unserved(flags: str) -> list[tuple[int, int]]:
    """Compute capabilities of visible devices on which code built with these flags (nvcc's -gencode) does not run."""
    codes = list(_CODE.finditer(flags))
    return [here for here in _capabilities() if not any(_runs(code, here) for code in codes)]


def why_unserved(flags: str) -> str:
    """The same in words; "" where it runs on all of them."""
    if not (left_out := unserved(flags)):
        return ""
    names = ", ".join(code[0].removeprefix("code=") for code in _CODE.finditer(flags)) or "no device"
    numbers = ", ".join(f"{major}.{minor}" for major, minor in left_out)
    return f"its code is for {names}, and does not run on the device here of compute capability {numbers}"


def _runs(code: re.Match[str], capability: tuple[int, int]) -> bool:
    """Machine code runs on its generation from its minor version on, PTX on all that is newer.

    Suffix a: on that very architecture. Suffix f: on its generation, PTX too. Source: CUDA's programming guide, on
    compatibility.
    """
    built = int(code["major"]), int(code["minor"])
    if code["only"] == "a":
        return built == capability
    if code["kind"] == "compute" and not code["only"]:
        return built <= capability
    return built[0] == capability[0] and built[1] <= capability[1]


def _capabilities() -> list[tuple[int, int]]:
    """Compute capabilities of the visible devices."""
    if not torch.cuda.is_available():
        return []
    return sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})


def _gencode(*, ahead: bool) -> list[str]:
    """nvcc's words for the architectures: SIVAE_CUDA_ARCHS ("80;90+PTX"), else those of the devices here.

    ahead: for other machines, too, so the usual ones, and those of devices here that these do not serve. Raises
    UnavailableError when SIVAE_CUDA_ARCHS cannot be read, or (not ahead) leaves out a device here.
    """
    if given := os.environ.get("SIVAE_CUDA_ARCHS"):
        words = _gencode_words(given)
        if not ahead and (why := why_unserved(" ".join(words))):
            fix = "name that device's architecture there, too (90 for 9.0), or unset it to build for the devices here"
            raise UnavailableError(f"SIVAE_CUDA_ARCHS is {given!r}: {why}", fix)
        return words
    wanted = unserved(" ".join(_gencode_words(ARCHITECTURES))) if ahead else _capabilities()
    listed = [f"{major}{minor}" for major, minor in wanted]
    return _gencode_words(";".join([*listed, ARCHITECTURES] if ahead or not listed else listed))


def _gencode_words(listed: str) -> list[str]:
    """An architecture list like 80;90+PTX in nvcc's words."""
    words = []
    for item in listed.replace(".", "").replace(",", ";").split(";"):
        number = item.strip().upper().removesuffix("+PTX")
        if not number.rstrip("AF").isdecimal():
            raise UnavailableError(f"SIVAE_CUDA_ARCHS is {listed!r}", "write it like 80;90+PTX")
        number = number.lower()
        words += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if item.strip().upper().endswith("+PTX"):
            words += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return words


@functools.cache
def _processor() -> str:
    """What -march=native depends on: a cache on a shared disk serves machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return hashlib.sha256("\n".join(sorted(kept)).encode()).hexdigest()[:16]

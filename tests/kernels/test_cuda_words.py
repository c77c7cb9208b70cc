"""The command lines for nvcc, with an nvcc that only says its version: host compiler, architectures."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import pytest
import torch
from lanes import devices

from sivae_dist.ops import _build, _toolchain
from sivae_dist.ops._toolchain import UnavailableError


@pytest.fixture(autouse=True)
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CUDA toolkit as far as a recipe looks at it, and the only compilers on the PATH."""
    version = torch.version.cuda or "13.0"
    programs = {"nvcc": f"echo Cuda compilation tools, release {version}, V{version}.1", "ccache": "", "g++": ""}
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "include/cuda_runtime.h").touch()
    for name, line in {**programs, "conda-c++": ""}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("SIVAE_CUDA_ARCHS", "80")
    return tmp_path


def lines() -> dict[str, list[str]]:
    """The words of the build's variables: flags, link."""
    text = _build.ninja_file(_toolchain.recipe("cuda"))
    pairs = (line.split(" = ", 1) for line in text.splitlines() if line.startswith(("flags = ", "link = ")))
    return {key: shlex.split(value) for key, value in pairs}


def after(words: list[str], option: str) -> list[str]:
    return [value for word, value in itertools.pairwise(words) if word == option]


@pytest.mark.parametrize(
    ("cxx", "compiler", "flags"),
    [
        (None, "g++", []),
        ("conda-c++", "conda-c++", []),
        ("ccache g++", "g++", []),
        ("{bin}/ccache distcc {bin}/conda-c++", "{bin}/conda-c++", []),
        ("ccache g++ -m64 --sysroot=/a,b '-DNAME=c d'", "g++", ["-m64", r"--sysroot=/a\,b", "'-DNAME=c d'"]),
    ],
)
def test_one_compiler_compiles_and_links(
    toolkit: Path, monkeypatch: pytest.MonkeyPatch, cxx: str | None, compiler: str, flags: list[str]
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    if cxx is not None:
        monkeypatch.setenv("CXX", cxx.format(bin=toolkit / "bin"))
    words = lines()
    for step in ("flags", "link"):
        assert after(words[step], "-ccbin") == [compiler.format(bin=toolkit / "bin")]
        assert [f for f in after(words[step], "-Xcompiler") if "-fPIC" not in f] == flags


@pytest.mark.parametrize(("cxx", "told"), [("ccache", "ccache is none"), ("ccache nowhere-c++", "nowhere-c.. is not")])
def test_a_launcher_alone_is_no_compiler(monkeypatch: pytest.MonkeyPatch, cxx: str, told: str) -> None:
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(UnavailableError, match=told) as caught:
        _toolchain.recipe("cuda")
    assert "CXX" in caught.value.fix


@pytest.mark.parametrize(
    ("here", "now", "ahead"),
    [
        ([], ["sm_80", "sm_90", "compute_90"], ["sm_80", "sm_90", "compute_90"]),
        ([(9, 0), (8, 6)], ["sm_86", "sm_90"], ["sm_80", "sm_90", "compute_90"]),
        ([(7, 5), (12, 0)], ["sm_75", "sm_120"], ["sm_75", "sm_80", "sm_90", "compute_90"]),
    ],
)
def test_architectures_are_those_here_and_ahead_the_usual_ones_too(
    monkeypatch: pytest.MonkeyPatch, here: list[tuple[int, int]], now: list[str], ahead: list[str]
) -> None:
    monkeypatch.delenv("SIVAE_CUDA_ARCHS")
    devices(monkeypatch, here)
    for early, wanted in ((False, now), (True, ahead)):
        codes = after(list(_toolchain.recipe("cuda", ahead=early).flags), "-gencode")
        assert [code.partition("code=")[2] for code in codes] == wanted


def test_named_architectures_that_leave_out_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    devices(monkeypatch, [(8, 6), (9, 0)])
    with pytest.raises(UnavailableError, match=r"SIVAE_CUDA_ARCHS is '80'.*sm_80.*compute capability 9.0$") as caught:
        _toolchain.recipe("cuda")
    assert "unset it" in caught.value.fix
    assert "code=sm_80" in " ".join(_toolchain.recipe("cuda", ahead=True).flags)  # for other machines
    monkeypatch.setenv("SIVAE_CUDA_ARCHS", "8.0+PTX")
    assert "code=compute_80" in " ".join(_toolchain.recipe("cuda").flags)

"""The CUDA sources under nvcc: they compile for all architectures without a warning, and nothing spills."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch

from sivae_dist.ops import _build, _toolchain
from sivae_dist.ops._toolchain import UnavailableError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built() -> _build.Built:
    """Architectures as for a wheel: compiled for 8.0 and 9.0, with PTX for what comes later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIVAE_CUDA_ARCHS", _toolchain.ARCHITECTURES)
        nvcc()
        return _build.ensure("cuda")


def nvcc() -> str:
    try:
        return _toolchain.nvcc_command()[0]
    except UnavailableError as error:
        pytest.skip(f"nvcc: {error.why}")


def kernels_of(report: str) -> list[tuple[str, str, dict[str, int]]]:
    """(kernel, architecture, numbers) for every entry of ptxas's report."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>sm_\w+)'.*?"
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    return [
        (m["name"], m["arch"], {k: int(m[k]) for k in ("stores", "loads", "registers")})
        for m in pattern.finditer(report)
    ]


def test_no_kernel_spills(built: _build.Built) -> None:
    found = kernels_of((built.library.parent / _build.REPORT).read_text())
    assert {arch for _, arch, _ in found} == {"sm_80", "sm_90"}
    for operator in ("upfirdn2d", "bias_act", "adain_act", "norm_act", "modulated_conv2d"):
        assert sum(operator in name for name, _, _ in found) > 20
    spilling = [(name, arch, numbers) for name, arch, numbers in found if numbers["stores"] or numbers["loads"]]
    assert spilling == []
    assert max(numbers["registers"] for _, _, numbers in found) <= 128


def test_the_library_holds_code_for_each_architecture_and_ptx(built: _build.Built) -> None:
    flags = built.facts["flags"]
    for part in (
        "compute_80,code=sm_80",
        "compute_90,code=sm_90",
        "compute_90,code=compute_90",
        "-Werror all-warnings",
    ):
        assert part in flags
    assert b".nv_fatbin" in built.library.read_bytes()


def test_it_loads_beside_this_torch_and_registers_its_operators(built: _build.Built) -> None:
    """Without a CUDA device nothing can run; the operators' entries for CUDA tensors are there all the same."""
    torch.ops.load_library(built.library)
    for name in ("upfirdn2d", "upfirdn2d_backward", "bias_act", "bias_act_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sivae::{name}", "CUDA")


def test_flags_of_the_host_compiler_reach_it(tmp_path: Path) -> None:
    """With blanks and commas, compiling and linking."""
    folder = tmp_path / "a, b"
    folder.mkdir()
    (folder / "given.h").write_text("#define GIVEN 42\n")
    (tmp_path / "probe.cu").write_text('#include "given.h"\nextern "C" int probe() { return GIVEN + MORE; }\n')
    host = _toolchain.host_words(("ccache", "c++", f"-I{folder}", "-DMORE=(1, 2)", "-fPIC"))
    for step in (["-c", "probe.cu", "-o", "probe.o"], ["-shared", "probe.o", "-o", "probe.so"]):
        subprocess.run([nvcc(), *host, *step], cwd=tmp_path, check=True, timeout=300)
    assert ctypes.CDLL(str(tmp_path / "probe.so")).probe() == 44


def test_the_report_is_read_right(tmp_path: Path) -> None:
    text = (
        "ptxas info    : Compiling entry function '_Zab' for 'sm_80'\nptxas info    : Function properties for _Zab\n"
        "    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers\n"
    )
    assert kernels_of(text) == [("_Zab", "sm_80", {"stores": 4, "loads": 8, "registers": 40})]

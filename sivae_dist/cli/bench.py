"""`sivae-dist bench kernels`."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable
from typing import Literal

from sivae_dist.errors import UserError


def kernels(
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    channels_last: bool = False,
    batch: int | None = None,
    only: str = "",
    compile: bool = True,
    seconds: float = 1.0,
    json: bool = False,
) -> None:
    """Time the fused kernels against plain PyTorch, torch.compile, and what this device can do at most.

    Args:
        device: auto is cuda if there is a device, else cpu.
        precision: Number format of the maps.
        channels_last: Channels innermost in memory.
        batch: Images, instead of what fits the resolution and the device.
        only: Cases whose operator and name contain this text.
        compile: Also time torch.compile of plain PyTorch (takes a while to compile).
        seconds: Time for each implementation of each case.
        json: Print one object for programs.
    """
    import torch  # noqa: PLC0415 (--help stays quick)

    from sivae_dist.apps.bench import kernels as app  # noqa: PLC0415

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device", "give --device cpu")
    where = torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    ceiling, results = app.run(app.Setting(where, dtype, channels_last, batch, compile), only, seconds)
    rows = [result.row(ceiling) for result in results]
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    layout = "channels_last" if channels_last else "contiguous"
    if json:
        facts: dict[str, object] = {
            "device": name,
            "torch": torch.__version__,
            "precision": precision,
            "layout": layout,
        }
        facts |= {"copy_bytes_per_s": ceiling.copy, "matrix_flops_per_s": ceiling.matrix}
        print(jsonlib.dumps({**facts, "cases": rows}, indent=1))
        return
    print(f"{name}, torch {torch.__version__}, {precision}, {layout}")
    print(f"copy {ceiling.copy / 1e9:.1f} GB/s, matrix product {ceiling.matrix / 1e12:.2f} TFLOP/s, medians in ms")
    others = "  ".join(f"{f'x {name}':>10}" for name in ("eager", "compile"))
    print(f"{'case':<58}{'kernel':>10}{'of copy':>9}{'of matrix':>11}  {others}")
    for row, result in zip(rows, results, strict=True):
        speedup = "  ".join(
            f"{result.seconds[k] / result.seconds['kernel']:>10.2f}" if k in result.seconds else f"{'-':>10}"
            for k in ("eager", "compile")
        )
        print(
            f"{result.case.operator + ' ' + result.case.name:<58}{result.seconds['kernel'] * 1e3:>10.3f}"
            f"{row['of_copy_bandwidth']:>9.0%}{row['of_matrix_rate']:>11.1%}  {speedup}"
        )
        for implementation, why in result.failures.items():
            print(f"    {implementation} failed: {why}")


COMMANDS: dict[str, Callable[..., object]] = {"bench kernels": kernels}

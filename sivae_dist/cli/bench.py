"""`sivae-dist bench kernels | step | toy | reduce | data | plan | checkpoint`."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from sivae_dist.errors import UserError


def kernels(
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    channels_last: bool = False,
    px: tuple[Literal[256, 1024], ...] = (),
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
        px: Resolutions of the recipes whose shapes to take; by default both on a GPU, 256 on a CPU.
        batch: Images, instead of what fits the resolution and the device.
        only: Cases whose operator and name contain this text.
        compile: Also time torch.compile of plain PyTorch (takes a while to compile).
        seconds: Time for each implementation of each case.
        json: Print one object for programs.
    """
    import torch  # noqa: PLC0415 (--help stays quick)

    from sivae_dist.apps.bench import kernels as app  # noqa: PLC0415

    where = torch.device(_device(device))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    sizes: tuple[int, ...] = px or (tuple(app.RESOLUTIONS) if where.type == "cuda" else (256,))
    ceiling, results = app.run(app.Setting(where, dtype, channels_last, batch, compile, sizes), only, seconds)
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
    names = [name for name in ("two passes", "eager", "compile") if any(name in r.case.calls for r in results)]
    others = "  ".join(f"{f'x {name}':>12}" for name in names)
    print(f"{'case':<58}{'kernel':>10}{'of copy':>9}{'of matrix':>11}  {others}")
    for row, result in zip(rows, results, strict=True):
        speedup = "  ".join(
            f"{result.seconds[k] / result.seconds['kernel']:>12.2f}" if k in result.seconds else f"{'-':>12}"
            for k in names
        )
        print(
            f"{result.case.operator + ' ' + result.case.name:<58}{result.seconds['kernel'] * 1e3:>10.3f}"
            f"{row['of_copy_bandwidth']:>9.0%}{row['of_matrix_rate']:>11.1%}  {speedup}"
        )
        for implementation, why in result.failures.items():
            print(f"    {implementation} failed: {why}")


def toy(*, seconds: float = 10.0, json: bool = False) -> None:
    """Time a 2-D Soft-IntroVAE iteration against a plain loop that does what the public code does, on one thread.

    Args:
        seconds: CPU time for each.
        json: Print for programs.
    """
    import torch  # noqa: PLC0415 (--help stays quick)

    from sivae_dist.apps.bench import toy as app  # noqa: PLC0415

    rows = app.run(seconds)
    plain = rows[0].seconds
    if json:
        print(jsonlib.dumps([{**vars(row), "ratio": plain / row.seconds} for row in rows], indent=1))
        return
    print(f"torch {torch.__version__}, 1 thread, batch {app.BATCH}, CPU time, medians")
    print(f"{'':<26}{'ms/iteration':>14}{'its/s':>9}{'of which data':>15}{'x plain':>9}")
    for row in rows:
        rate, share = 1 / row.seconds, row.data_s / row.seconds
        print(f"{row.name:<26}{row.seconds * 1e3:>14.2f}{rate:>9.1f}{share:>15.1%}{plain / row.seconds:>9.2f}")


def step(
    config: Path,
    /,
    *,
    vary: tuple[str, ...] = (),
    batch: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    seconds: float = 10.0,
    json: bool = False,
) -> None:
    """Time a recipe's iteration on drawn pictures, as it is and with settings changed, in turns.

    Args:
        config: A recipe (YAML).
        vary: Settings to compare with, each section.key=value, or several of them parted by commas:
            train.decode_once=true precision.dtype=bf16,kernels.mode=reference.
        batch: Images of this one process in one piece, instead of the recipe's batch and accumulation.
        device: auto is cuda if there is a device, else cpu.
        seconds: Time for each, by the clock.
        json: Print for programs.
    """
    import torch  # noqa: PLC0415 (--help stays quick)

    from sivae_dist.apps.bench import step as app  # noqa: PLC0415

    if batch is not None and batch < 1:
        raise UserError(f"--batch is {batch}, expected 1 or more", "give a larger --batch")
    place = _device(device)
    rows = app.run(app.varied(config, vary, batch), place, seconds)
    if json:
        print(jsonlib.dumps([vars(row) for row in rows], indent=1))
        return
    name = torch.cuda.get_device_name(place) if place == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, medians of an iteration")
    width = max(30, *(len(row.name) + 2 for row in rows))
    print(f"{'':<{width}}{'ms':>10}{'CPU ms':>10}{'images/s':>10}{'peak GiB':>10}{'x as fast':>10}")
    for row in rows:
        peak = f"{row.peak_bytes / 2**30:>10.2f}" if row.peak_bytes is not None else f"{'-':>10}"
        print(
            f"{row.name:<{width}}{row.wall_ms:>10.1f}{row.cpu_ms:>10.1f}{row.images_per_s:>10.1f}{peak}{row.ratio:>10.3f}"
        )


def _device(wanted: str) -> Literal["cpu", "cuda"]:
    """auto is cuda if there is a device. Raises UserError for one that is not there."""
    import torch  # noqa: PLC0415

    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device", "give --device cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def data(
    *,
    url: str = "",
    resolutions: tuple[int, ...] = (256, 1024),
    workers: tuple[int, ...] = (0, 1, 2),
    batch: int = 0,
    grain: float = 1.5,
    seconds: float = 2.0,
    turns: int = 5,
    served: bool = False,
    json: bool = False,
) -> None:
    """Time the data loader against bare decoding, the stock webdataset pipeline, and a folder of files.

    Args:
        url: A shard folder of yours, of JPEGs or others, instead of drawn scenes.
        resolutions: Sides of the drawn scenes in pixels.
        workers: Numbers of worker processes to try; 0 decodes in the training process.
        batch: Pictures a batch; by default 32 below 512 pixels, else 8.
        grain: Noise on drawn scenes, in grey levels; 1.5 makes JPEGs of about 200 kB at 1024 px, as photos have.
        seconds: Time of a turn.
        turns: Turns of each contender, of which the medians are told.
        served: Also read the same shards from a web server on this machine: an epoch into an empty cache, from a full
            cache, and without one.
        json: Print for programs.
    """
    import contextlib  # noqa: PLC0415 (--help stays quick)
    import tempfile  # noqa: PLC0415
    from dataclasses import asdict  # noqa: PLC0415
    from pathlib import Path  # noqa: PLC0415

    from sivae_dist.apps.bench import data as app  # noqa: PLC0415
    from sivae_dist.apps.bench.served import serving  # noqa: PLC0415

    found = []
    if not json:
        print(f"{'':<26}{'px':>6}{'workers':>9}{'images/s':>10}{'of bare':>9}{'CPU ms':>9}{'of bare':>9}")
    with tempfile.TemporaryDirectory(prefix="sivae-bench-") as place:
        for resolution in (0,) if url else resolutions:
            root, size = Path(place), batch or (32 if resolution < 512 else 8)
            count = max(8 * size, 1024 * 256 * 256 // max(1, resolution) ** 2)
            drawn = url or app.draw(root / "shards", resolution, count, grain)
            pictures = app.laid_out(drawn, root / f"files-{resolution}")
            if not json:
                print(f"{len(pictures.encoded)} pictures of {pictures.kilobytes:.1f} kB in batches of {size}")
            with serving(drawn) if served else contextlib.nullcontext("") as address:
                for number in workers:
                    rows = app.run(pictures, number, batch=size, seconds=seconds, turns=turns, address=address)
                    found += [{**asdict(row), "kilobytes": pictures.kilobytes, "batch": size} for row in rows]
                    for row in () if json else rows:
                        print(
                            f"{row.name:<26}{row.resolution:>6}{row.workers:>9}{row.images_per_s:>10.1f}"
                            f"{row.wall_of_bare:>9.1%}{row.cpu_ms:>9.3f}{row.of_bare:>9.1%}"
                        )
    if json:
        print(jsonlib.dumps(found, indent=1))


def plan(
    *,
    samples: int = 3_000_000,
    shards: int = 3_000,
    ranks: int = 1024,
    lanes: int = 1024,
    window: int = 256,
    batch: int = 8192,
    tables: bool = False,
    json: bool = False,
) -> None:
    """Simulate the data plan of a large set on many machines: its costs, its promises, how well it shuffles.

    Args:
        samples: In the data set.
        shards: Of about equal size.
        ranks: Processes that share a global batch.
        lanes: data.lanes, at least as many as ranks.
        window: data.window.
        batch: Global batch.
        tables: Also compare lanes and windows with a full shuffle, and the reads they take (minutes).
        json: Print for programs.
    """
    from dataclasses import replace  # noqa: PLC0415 (--help stays quick)

    from sivae_dist.apps.bench import plan as app  # noqa: PLC0415

    for name, value in {"samples": samples, "shards": shards, "ranks": ranks, "batch": batch}.items():
        if value < 1:
            raise UserError(f"--{name} is {value}, expected 1 or more", f"give a larger --{name}")
    if lanes < ranks:
        raise UserError(f"--lanes is {lanes}, fewer than the {ranks} ranks", "give as many lanes as ranks, or more")
    size = app.Size(samples=samples, shards=shards, ranks=ranks, lanes=lanes, window=window, batch=batch)
    found: dict[str, object] = {**vars(size), "costs": app.costs(size), "promises": app.promises(size)}
    if tables:
        small = replace(size, batch=min(256, batch))
        found["mixing"] = [app.mixing(small, *each) for each in app.CHOICES]
    if json:
        print(jsonlib.dumps(found, indent=1))
        return
    print(f"{samples} samples in {shards} shards, {ranks} ranks, {lanes} lanes, window {window}, batch {batch}")
    for title in ("costs", "promises"):
        print(title)
        for key, value in found[title].items():  # type: ignore[attr-defined]
            print(f"  {key:<28}{value:>12.4g}")
    if tables:
        rows = found["mixing"]
        assert isinstance(rows, list)
        print("".join(f"{name:>13}" for name in rows[0]))
        for row in rows:
            print("".join(f"{value:>13.4g}" for value in row.values()))


def checkpoint(config: Path, /, *, checkpoints: int = 3, out: Path | None = None, json: bool = False) -> None:
    """Time how long training waits for a checkpoint in each format, and iterations while one is being written.

    Several processes: accelerate launch ... -m sivae_dist bench checkpoint CONFIG.

    Args:
        config: A recipe (YAML); its pictures are drawn.
        checkpoints: How many to write of each format, after one that warms up.
        out: Where to write them, on the disk that counts. They are removed again.
        json: Print for programs.
    """
    from sivae_dist.apps.bench import checkpoint as app  # noqa: PLC0415 (--help stays quick)
    from sivae_dist.engine.config import from_dict, read_yaml  # noqa: PLC0415

    if checkpoints < 1:
        raise UserError(f"--checkpoints is {checkpoints}, expected 1 or more", "3 is usual")
    rows, launch = app.run(from_dict(read_yaml(config), str(config)), checkpoints=checkpoints, out=out)
    if launch.group.is_main and json:
        print(jsonlib.dumps([vars(row) for row in rows], indent=1))
    elif launch.group.is_main:
        facts = launch.describe()
        print(f"{facts['ranks']} ranks on {facts['device']}, seconds, medians")
        names = ("iteration", "during", "wait", "compare", "write")
        print(f"{'format':<10}" + "".join(f"{name:>11}" for name in names) + f"{'MiB':>10}")
        for row in rows:
            print(
                f"{row.format:<10}"
                + "".join(f"{getattr(row, n):>11.3f}" for n in names)
                + f"{row.bytes / 2**20:>10.1f}"
            )
    launch.finish()


def reduce(
    *,
    image_size: int = 64,
    channels: tuple[int, ...] = (64, 128, 256, 512),
    batch: int = 2,
    bucket_mib: float = 16.0,
    iterations: int = 10,
    json: bool = False,
) -> None:
    """Time the strategy ddp with and without overlap: `accelerate launch ... -m sivae_dist bench reduce`.

    Args:
        image_size: Pixels a side of the residual network.
        channels: Its widths.
        batch: Images a rank.
        bucket_mib: Gradients are summed in buckets of so many MiB.
        iterations: Timed ones of each kind, in turn.
        json: Print for programs.
    """
    from sivae_dist.apps.bench import reduce as app  # noqa: PLC0415 (--help stays quick)
    from sivae_dist.distributed import launch  # noqa: PLC0415
    from sivae_dist.distributed.config import DistributedConfig  # noqa: PLC0415
    from sivae_dist.models.residual import ResidualConfig  # noqa: PLC0415

    started = launch.start(DistributedConfig())
    if started.group.ranks == 1:
        raise UserError("one process sums nothing", "start it with `accelerate launch`, see launch/accelerate")
    model = ResidualConfig(image_size=image_size, channels=channels, norm="group")
    rows = app.run(started, model, batch=batch, bucket_mib=bucket_mib, iterations=iterations)
    if started.group.is_main and json:
        print(jsonlib.dumps([vars(row) for row in rows], indent=1))
    elif started.group.is_main:
        print(f"{started.group.ranks} ranks on {started.describe()['device']}, medians of {iterations}")
        for row in rows:
            print(
                f"{row.name:<26}{row.seconds * 1e3:>10.1f} ms{row.nbytes / 2**20:>10.1f} MiB"
                f"{row.collectives:>6.0f} collectives{rows[0].seconds / row.seconds:>8.2f} x"
            )
    started.finish()


COMMANDS: dict[str, Callable[..., object]] = {
    "bench kernels": kernels,
    "bench step": step,
    "bench toy": toy,
    "bench reduce": reduce,
    "bench data": data,
    "bench plan": plan,
    "bench checkpoint": checkpoint,
}

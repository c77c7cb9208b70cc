"""`sivae-dist suggest DATA`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from sivae_dist.errors import UserError


def suggest(
    data: str,
    /,
    *,
    objective: Literal["soft_introvae", "introvae"] = "soft_introvae",
    config: Path | None = None,
    out: Path = Path("suggested.yaml"),
    images: int = 0,
    minutes: float = 10.0,
    beta_rec: float | None = None,
    width: float = 1.0,
    run: Path | None = None,
) -> None:
    """Train a plain VAE for a few minutes and propose margin and betas for these data, as a config to train with.

    Args:
        data: Shard folder (made by `sivae-dist data pack`).
        objective: Which one the written config trains; both are proposed.
        config: YAML file of the run to be. Without it: the published network for the data's resolution.
        out: The config to write.
        images: Images of the warm-up; by default two epochs, at least 2,000 and at most 50,000.
        minutes: The warm-up stops after this time at the latest.
        beta_rec: Weight of the reconstruction error, instead of the config's (or 1).
        width: Factor of the network's widths, without --config. 0.25 is quick on a CPU.
        run: Keep the warm-up as a run in this folder.
    """
    from sivae_dist.apps import suggest as app  # noqa: PLC0415 (keeps --help quick)
    from sivae_dist.data.shard_read import load_manifest  # noqa: PLC0415
    from sivae_dist.data.store import open_store  # noqa: PLC0415
    from sivae_dist.engine.config import merge, read_yaml  # noqa: PLC0415

    if images < 0 or minutes <= 0 or not 0 < width <= 16 or (beta_rec is not None and beta_rec <= 0):
        raise UserError(
            f"--images {images}, --minutes {minutes}, --width {width}, --beta-rec {beta_rec} are not all in range",
            "images at least 0 (0: two epochs), the others positive, width at most 16",
        )
    if out.exists():
        raise UserError(f"{out} is there already", "choose another --out, or remove it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"there is no folder {out.absolute().parent}", "make it, or choose another --out")
    splits = load_manifest(open_store(data)).splits()
    values = read_yaml(config) if config is not None else {"model": app.default_model(data, width)}
    values = merge(values, {"data": {"url": data}})
    if beta_rec is not None:
        values = merge(values, {"objective": {"beta_rec": beta_rec}})
    epoch = splits.get(values["data"].get("split", "train"), {}).get("samples", 0)
    images = images or min(max(2 * epoch, 2000), 50_000)
    source = str(config or "the command line")
    lines, suggested = app.suggest(values, source, objective=objective, images=images, minutes=minutes, folder=run)
    lines = [part for line in lines for part in _wrapped(line)]
    print("\n".join(lines))
    out.write_text(_text(lines, suggested), encoding="utf-8")
    print(f"\nwritten: {out}   next: sivae-dist train --config {out}")


def _wrapped(line: str) -> list[str]:
    mark = line[:4] if line.startswith(("  - ", "  ! ")) else ""
    inner = " " * max(len(mark), 2)
    return textwrap.wrap(line, 100, subsequent_indent=inner, break_long_words=False) or [""]


def _text(lines: list[str], values: dict[str, Any]) -> str:
    import yaml  # noqa: PLC0415

    head = "\n".join(f"# {line}".rstrip() for line in lines)
    return f"# Proposed by `sivae-dist suggest`.\n#\n{head}\n" + yaml.safe_dump(values, sort_keys=False)


COMMANDS: dict[str, Callable[..., None]] = {"suggest": suggest}

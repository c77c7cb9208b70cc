"""`sivae-dist import PATH`: a published checkpoint becomes a run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

# "auto", then interop.published.Format (spelled out: --help must not import torch)
Choice = Literal[
    "auto",
    "soft-introvae-residual",
    "soft-introvae-bootstrap",
    "soft-introvae-style",
    "soft-introvae-2d",
    "soft-introvae-3d",
    "introvae",
]


def import_checkpoint(
    path: Path,
    /,
    *,
    out: Path,
    format: Choice = "auto",
    config: Path | None = None,
    data: str = "",
    kimg: float | None = None,
) -> None:
    """Turn a published checkpoint (.pth) into a run folder. Nothing in the file is executed.

    Args:
        path: The published file.
        out: The run folder to make.
        format: Which public implementation wrote it; auto tells it from the content.
        config: A recipe whose settings besides the model the run gets, for example configs/celebahq256_residual.yaml.
        data: Shard folder to evaluate or train on; by default that of --config.
        kimg: Thousand images the network has seen, if known; files do not tell. Without it 0, or with a --config that
            grows the network as many as bring it to full size.
    """
    from sivae_dist.apps.import_published import describe, import_published  # noqa: PLC0415 (keeps --help quick)

    done = import_published(
        path, out, format=None if format == "auto" else format, recipe=config, data_url=data, kimg=kimg
    )
    print("\n".join(describe(done)))


COMMANDS: dict[str, Callable[..., None]] = {"import": import_checkpoint}

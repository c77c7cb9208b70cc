"""`accelerate launch [flags] -m sivae_dist.train --config configs/NAME.yaml [--section.key value ...]`."""

from __future__ import annotations

import sys

from sivae_dist.cli.errors import guarded


def _train(arguments: list[str]) -> None:
    from sivae_dist.cli.train import run  # noqa: PLC0415 (loads torch: inside the guard, which tells of a broken one)

    run(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `python -m sivae_dist.train`."""
    guarded(_train, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()

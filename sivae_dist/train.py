"""`accelerate launch [flags] -m sivae_dist.train --config configs/NAME.yaml [--section.key value ...]`."""

from __future__ import annotations

from sivae_dist.cli.train import main

if __name__ == "__main__":
    main()

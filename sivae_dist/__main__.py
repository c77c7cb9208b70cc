"""`python -m sivae_dist` is `sivae-dist`."""

from sivae_dist.cli import main

main()

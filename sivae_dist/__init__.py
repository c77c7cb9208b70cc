"""Composable, resumable, multi-node training of introspective variational autoencoders."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`load` and `train` are imported when first used: importing sivae_dist costs nothing."""
    if name == "load":
        from sivae_dist.engine.load import load  # noqa: PLC0415

        return load
    if name == "train":
        from sivae_dist.engine.run import train  # noqa: PLC0415

        return train
    raise AttributeError(f"module 'sivae_dist' has no attribute {name!r}")

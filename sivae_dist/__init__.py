"""Composable, resumable, multi-node training of introspective variational autoencoders."""

__version__ = "0.1.0"

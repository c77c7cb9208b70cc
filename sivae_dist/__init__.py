"""Composable, resumable, multi-node training of introspective variational autoencoders."""

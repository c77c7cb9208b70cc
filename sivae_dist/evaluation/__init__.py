"""Judging models: how well they reproduce, how like the data their samples are, and pictures of both."""

"""Packaging. Metadata stands in pyproject.toml; what needs code (packages, shipped data) stands here."""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["sivae_dist", "sivae_dist.*"]))

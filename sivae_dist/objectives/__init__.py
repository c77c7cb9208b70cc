"""The papers' objectives, one file each."""

from sivae_dist.objectives.base import Draws, Objective, ObjectiveConfig, Phase, Players, Strength, Terms

__all__ = ["Draws", "Objective", "ObjectiveConfig", "Phase", "Players", "Strength", "Terms"]

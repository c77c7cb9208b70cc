"""The checks of settings that all style-based autoencoders share."""

from __future__ import annotations

from typing import Protocol

from sivae_dist.errors import UserError


class StyledSettings(Protocol):
    """What the configurations of style-based autoencoders have in common, as far as it is checked here."""

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        ...

    @property
    def input_range(self) -> tuple[float, float]:
        """Lowest and highest value of a pixel."""
        ...

    @property
    def truncation_cutoff(self) -> int:
        """Layers whose styles are truncated."""
        ...


def check_styled(config: StyledSettings, *widths: str) -> None:
    """Raises UserError for values that make no network. widths: the fields that say how many feature maps there are."""
    for field in ("channels_in", *widths, "latent_size", "mapping_layers"):
        if getattr(config, field) < 1:
            raise UserError(f"model.{field} is {getattr(config, field)}, expected 1 or more", "raise it")
    if config.image_size < 8 or config.image_size & (config.image_size - 1):
        below = 1 << max(3, config.image_size.bit_length() - 1)
        raise UserError(
            f"model.image_size is {config.image_size}: levels double from 4 pixels, so it must be a power of two, "
            "8 or more",
            f"use {below} or {2 * below} pixels",
        )
    if not config.input_range[0] < config.input_range[1]:
        raise UserError(f"model.input_range is {config.input_range}, expected (low, high)", "use (-1, 1) or (0, 1)")
    for field in ("style_mixing_prob", "dlatent_avg_beta"):
        if not 0 <= getattr(config, field) <= 1:
            raise UserError(f"model.{field} is {getattr(config, field)}, expected 0 to 1", "correct the value")
    if config.truncation_cutoff < 0:
        raise UserError(f"model.truncation_cutoff is {config.truncation_cutoff}, expected 0 or more", "raise it")

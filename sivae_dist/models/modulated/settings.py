"""Settings of the modulated autoencoder: what its two networks are built from."""

from __future__ import annotations

from dataclasses import dataclass

from sivae_dist.errors import UserError
from sivae_dist.models.modulated.layers import Norm
from sivae_dist.models.style.checks import check_styled
from sivae_dist.models.style.styled import MapNoise


@dataclass(frozen=True)
class ModulatedSettings:
    """See ModulatedConfig, which builds it all."""

    channels_in: int = 3
    """Image channels."""
    image_size: int = 256
    """Pixels a side: a power of two, 8 or more."""
    channel_base: int = 16384
    """Feature maps times pixels a side, for levels that do not reach `channel_max`."""
    channel_max: int = 512
    """Feature maps at most."""
    latent_size: int = 512
    """Latent dimensions, of z and of a style."""
    mapping_layers: int = 8
    """Layers of the network that maps z to a style."""
    mapping_multiplier: float = 0.1
    """Learning rate of that network, as a part of the decoder's. ALAE's under this objective; StyleGAN2 has 0.01."""
    style_spread: float = 0.3
    """Standard deviation of the styles around one in a fresh network; StyleGAN2's is 1. With 1, every dimension of a
    code shakes the image at first, and the encoder learns to spend KL on quieting them all."""
    input_range: tuple[float, float] = (-1.0, 1.0)
    """What black and white become; part of the model, so of its checkpoints."""
    resample_filter: tuple[float, ...] = (1.0, 3.0, 3.0, 1.0)
    """Taps of the filter behind every change of size; normalised, used along both axes."""
    encoder_norm: Norm = "group"
    """What stands before each residual block's convolutions in the encoder: none, group (group norm) or pixel (features
    of a pixel brought to unit mean square). All look at one sample alone, so nothing depends on the batch or ranks."""
    noise: MapNoise = "random"
    """Noise maps that the decoder adds: random (one a sample, drawn for each call), batch_constant (one for a whole
    batch), fixed (always the same) or off. Where nobody hands the decoder draws (decoding for a user), the first two
    become fixed."""
    style_mixing_prob: float = 0.9
    """Training: how often a batch of prior samples takes its finer layers' style from a second z; 0 never."""
    dlatent_avg_beta: float = 0.995
    """Weight of the old value when the average style is updated, which truncation needs; at every decoding in
    training."""
    truncation_cutoff: int = 8
    """Layers, from the coarsest (two a level), on which truncation acts when sampling asks for it."""
    clamp: float | None = 256.0
    """Bound of activations: with it, sums of convolutions stay below half precision's largest number. None: none."""

    @property
    def layer_count(self) -> int:
        """Levels: 4x4 pixels, 8x8, ... image_size."""
        return self.image_size.bit_length() - 2

    def width(self, pixels: int) -> int:
        """Feature maps at this many pixels a side."""
        return max(1, min(self.channel_max, self.channel_base // pixels))

    def check(self) -> None:
        """Raises UserError for values that make no network."""
        check_styled(self, "channel_base", "channel_max")
        if not self.mapping_multiplier > 0:
            raise UserError(
                f"model.mapping_multiplier is {self.mapping_multiplier}, expected more than 0", "use 0.1, say"
            )
        if not self.style_spread > 0:
            raise UserError(f"model.style_spread is {self.style_spread}, expected more than 0", "use 0.3, or 1")
        if self.clamp is not None and not self.clamp > 0:
            raise UserError(f"model.clamp is {self.clamp}, expected more than 0, or None", "use 256, or None")
        if not self.resample_filter or abs(sum(self.resample_filter)) < 1e-6:
            raise UserError(
                f"model.resample_filter is {self.resample_filter}: taps that add up to nothing cannot be normalised",
                "use [1, 3, 3, 1]",
            )

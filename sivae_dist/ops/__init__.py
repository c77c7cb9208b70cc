"""Image operators, one file each: the public function, its formula, and a plain reference in float32 or wider."""

from sivae_dist.ops.adain_act import adain_act
from sivae_dist.ops.bias_act import bias_act
from sivae_dist.ops.conv2d_resample import conv2d_resample
from sivae_dist.ops.mlp import mlp
from sivae_dist.ops.modulated_conv2d import modulated_conv2d
from sivae_dist.ops.modulated_layer import modulated_layer
from sivae_dist.ops.norm_act import norm_act
from sivae_dist.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

__all__ = [
    "adain_act",
    "bias_act",
    "conv2d_resample",
    "downsample2d",
    "filter2d",
    "mlp",
    "modulated_conv2d",
    "modulated_layer",
    "norm_act",
    "setup_filter",
    "upfirdn2d",
    "upsample2d",
]

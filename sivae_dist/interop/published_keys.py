"""Parameter names of the public implementations and ours, both ways, and the configuration that their shapes imply.

Everything here works on names and shapes alone; reading files is someone else's job. Families:

    residual   github.com/taldatech/soft-intro-vae-pytorch, folder soft_intro_vae (keys encoder.*, decoder.*)
    introvae   github.com/hhb072/IntroVAE: the same names, another order of operations within a block
    twod       the 2-D experiments of the former
    style      the same authors' style-based network (keys encoder.*, decoder.*, mapping_*, dlatent_avg.*)

The published module names carry a nominal resolution (main.res_in_16). The encoder's fall, the decoder's rise and start
at 4 even when the bottom map is 7x7, so only their order is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from typing import Any, Literal, TypeVar

from sivae_dist.errors import UserError

Family = Literal["residual", "introvae", "twod", "style"]
Shape = tuple[int, ...]
_WHICH = "check which of residual, introvae, twod and style the file holds"
T = TypeVar("T")

# Published entries without a counterpart here, as patterns: an unused scalar parameter that never receives a gradient;
# the constant blur kernels.
DROPPED: dict[Family, tuple[str, ...]] = {
    "twod": ("decoder.loggamma",),
    "residual": (),
    "introvae": (),
    "style": ("*.blur.weight",),
}

_STAGE = re.compile(r"(encoder|decoder)\.main\.res_in_(\d+)\.(conv_expand|conv1|bn1|conv2|bn2)\.(\w+)")
_LONG_NUMBER = re.compile(r"\d{5}")  # no network has so many parts, and sizes are computed from these numbers
_BLOCK_PARTS = {"conv_expand": "skip", "conv1": "conv1", "bn1": "norm1", "conv2": "conv2", "bn2": "norm2"}
_RESIDUAL_PREFIXES = {
    "encoder.main.0.": "encoder.stem.conv.",
    "encoder.main.1.": "encoder.stem.norm.",
    "encoder.fc.": "encoder.head.",
    "decoder.fc.0.": "decoder.head.",
    "decoder.main.predict.": "decoder.output.",
}
_TWOD_PREFIXES = {"encoder.main.": "encoder.layers.", "decoder.main.": "decoder.layers."}
# Style: (pattern, ours). Encoder and decoder own the mapping networks behind and before them.
_STYLE = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"mapping_tl\.map_blocks\.(\d+)\.fc\.(weight|bias)", r"encoder.mapping.\1.\2"),
        (r"mapping_fl\.map_blocks\.(\d+)\.fc\.(weight|bias)", r"decoder.mapping.\1.\2"),
        (r"encoder\.from_rgb\.(\d+)\.from_rgb\.(weight|bias)", r"encoder.from_rgb.\1.\2"),
        (r"decoder\.to_rgb\.(\d+)\.to_rgb\.(weight|bias)", r"decoder.to_rgb.\1.\2"),
        (r"encoder\.encode_block\.(\d+)\.((?:conv|style|bias)_[12](?:\.weight|\.bias)?)", r"encoder.blocks.\1.\2"),
        (
            r"decoder\.decode_block\.(\d+)\.((?:conv|style|bias|noise_weight)_[12](?:\.weight|\.bias)?)",
            r"decoder.blocks.\1.\2",
        ),
        (r"decoder\.const", "decoder.const"),
        (r"dlatent_avg\.buff", "decoder.dlatent_avg"),
    )
)


def _stages(keys: Collection[str], player: str) -> list[int]:
    """The nominal resolutions of a player's residual blocks, in the order in which the data pass them."""
    found = {int(m[2]) for m in map(_STAGE.fullmatch, keys) if m and m[1] == player}
    return sorted(found, reverse=player == "encoder")


def belongs(family: Family, key: str) -> bool:
    """Whether a published key is one of the family's (dropped ones included)."""
    if _LONG_NUMBER.search(key):
        return False
    if is_dropped(family, key):
        return True
    if family == "style":
        return any(pattern.fullmatch(key) for pattern, _ in _STYLE)
    prefixes = _TWOD_PREFIXES if family == "twod" else _RESIDUAL_PREFIXES
    return key.startswith(tuple(prefixes)) or (family != "twod" and _STAGE.fullmatch(key) is not None)


def names(family: Family, published: Collection[str]) -> dict[str, str]:
    """Published name -> our name, for every published key except the dropped ones.

    Raises UserError for a key that does not belong to the family.
    """
    if family == "style":
        return {key: _style_name(key) for key in published if not is_dropped(family, key)}
    prefixes = _TWOD_PREFIXES if family == "twod" else _RESIDUAL_PREFIXES
    stages = {player: _stages(published, player) for player in ("encoder", "decoder")}
    table: dict[str, str] = {}
    for key in published:
        if is_dropped(family, key):
            continue
        prefix = next((p for p in prefixes if key.startswith(p)), None)
        block = _STAGE.fullmatch(key) if family != "twod" else None
        if prefix is not None:
            table[key] = prefixes[prefix] + key.removeprefix(prefix)
        elif block:
            player, resolution, part, leaf = block.groups()
            index = stages[player].index(int(resolution))
            place = "last" if index == len(stages[player]) - 1 else f"stages.{index}"
            table[key] = f"{player}.{place}.{_BLOCK_PARTS[part]}.{leaf}"
        else:
            raise _foreign(key, family)
    return table


def is_dropped(family: Family, key: str) -> bool:
    """Whether a published entry has no counterpart here."""
    return any(fnmatch(key, pattern) for pattern in DROPPED[family])


def _style_name(key: str) -> str:
    for pattern, ours in _STYLE:
        if found := pattern.fullmatch(key):
            return found.expand(ours)
    raise _foreign(key, "style")


def _foreign(key: str, family: Family) -> UserError:
    return UserError(f"{key!r} is no entry of a published {family} network", _WHICH)


def to_ours(family: Family, published: Mapping[str, T]) -> dict[str, T]:
    """A published state dict (or any mapping by published names) under our names; dropped entries are left out."""
    table = names(family, published.keys())
    return {table[key]: value for key, value in published.items() if key in table}


def settings(family: Family, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields of ResidualConfig (residual, introvae), MlpConfig (twod) or StyleConfig that give these shapes.

    `block` and `input_range` follow from the family, everything else from the shapes; whether equal wide stages have a
    1x1 skip is decided by the presence of its key. Raises UserError when the shapes do not fit together.
    """
    try:
        if family == "style":
            return _style_settings(shapes)
        return _twod_settings(shapes) if family == "twod" else _residual_settings(family, shapes)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"the entries do not make up a published {family} network ({type(error).__name__}: {error})", _WHICH
        ) from error


def _residual_settings(family: Family, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    stages = _stages(shapes.keys(), "encoder")
    stem = shapes["encoder.main.0.weight"]
    # The last block keeps its width: widths are the stem's and those that the other blocks put out.
    widths = [stem[0], *(shapes[f"encoder.main.res_in_{s}.conv1.weight"][0] for s in stages[:-1])]
    zdim = shapes["encoder.fc.bias"][0] // 2
    bottom = math.isqrt(shapes["decoder.fc.0.bias"][0] // widths[-1])
    condition_dim = shapes["decoder.fc.0.weight"][1] - zdim
    if widths[-1] * bottom**2 + condition_dim != shapes["encoder.fc.weight"][1]:
        raise ValueError("the linear layers of encoder and decoder differ in size")
    equal = [s for s, a, b in zip(stages, widths, widths[1:], strict=False) if a == b]
    projected = [f"encoder.main.res_in_{s}.conv_expand.weight" in shapes for s in equal]
    return {
        "channels_in": stem[1],
        "image_size": bottom * 2 ** len(widths),
        "channels": tuple(widths),
        "zdim": zdim,
        "condition_dim": condition_dim,
        "block": "introvae" if family == "introvae" else "soft_introvae",
        "equal_width_skip": "published_introvae" if any(projected) else "identity",
        "input_range": (0.0, 1.0),
    }


def _twod_settings(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    width, x_dim = shapes["encoder.main.input.weight"]
    return {
        "x_dim": x_dim,
        "width": width,
        "zdim": shapes["encoder.main.output.weight"][0] // 2,
        "hidden_layers": sum(key.startswith("encoder.main.hidden_") and key.endswith(".weight") for key in shapes),
    }


def _style_settings(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    layers = 1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("encoder.from_rgb."))
    startf, channels_in = shapes["encoder.from_rgb.0.from_rgb.weight"][:2]
    return {
        "channels_in": channels_in,
        "image_size": 4 << (layers - 1),
        "startf": startf,
        "maxf": max(shapes[f"encoder.encode_block.{i}.bias_2"][1] for i in range(layers)),
        "latent_size": shapes["mapping_tl.map_blocks.0.fc.weight"][0],
        "mapping_layers": sum(key.startswith("mapping_fl.") and key.endswith(".weight") for key in shapes),
        "input_range": (-1.0, 1.0),
    }

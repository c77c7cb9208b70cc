"""Parameter names of the public implementations and ours, both ways, and the configuration that their shapes imply.

Everything here works on names and shapes alone; reading files is someone else's job. Families:

    residual   github.com/taldatech/soft-intro-vae-pytorch, folder soft_intro_vae (keys encoder.*, decoder.*)
    introvae   github.com/hhb072/IntroVAE: the same names, another order of operations within a block
    twod       the 2-D experiments of the former

The published module names carry a nominal resolution (main.res_in_16). The encoder's fall, the decoder's rise and start
at 4 even when the bottom map is 7x7, so only their order is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeVar

from sivae_dist.errors import UserError

Family = Literal["residual", "introvae", "twod"]
Shape = tuple[int, ...]
T = TypeVar("T")

# Published entries without a counterpart here: an unused scalar parameter that never receives a gradient.
DROPPED = {"twod": ("decoder.loggamma",), "residual": (), "introvae": ()}

_STAGE = re.compile(r"(encoder|decoder)\.main\.res_in_(\d+)\.(conv_expand|conv1|bn1|conv2|bn2)\.(\w+)")
_BLOCK_PARTS = {"conv_expand": "skip", "conv1": "conv1", "bn1": "norm1", "conv2": "conv2", "bn2": "norm2"}
_RESIDUAL_PREFIXES = {
    "encoder.main.0.": "encoder.stem.conv.",
    "encoder.main.1.": "encoder.stem.norm.",
    "encoder.fc.": "encoder.head.",
    "decoder.fc.0.": "decoder.head.",
    "decoder.main.predict.": "decoder.output.",
}
_TWOD_PREFIXES = {"encoder.main.": "encoder.layers.", "decoder.main.": "decoder.layers."}


def _stages(keys: Collection[str], player: str) -> list[int]:
    """The nominal resolutions of a player's residual blocks, in the order in which the data pass them."""
    found = {int(m[2]) for m in map(_STAGE.fullmatch, keys) if m and m[1] == player}
    return sorted(found, reverse=player == "encoder")


def belongs(family: Family, key: str) -> bool:
    """Whether a published key is one of the family's (dropped ones included)."""
    prefixes = _TWOD_PREFIXES if family == "twod" else _RESIDUAL_PREFIXES
    block = family != "twod" and _STAGE.fullmatch(key) is not None
    return key in DROPPED[family] or block or key.startswith(tuple(prefixes))


def names(family: Family, published: Collection[str]) -> dict[str, str]:
    """Published name -> our name, for every published key except the dropped ones.

    Raises UserError for a key that does not belong to the family.
    """
    prefixes = _TWOD_PREFIXES if family == "twod" else _RESIDUAL_PREFIXES
    stages = {player: _stages(published, player) for player in ("encoder", "decoder")}
    table: dict[str, str] = {}
    for key in published:
        if key in DROPPED[family]:
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
            raise UserError(
                f"{key!r} is no entry of a published {family} network",
                "check which of residual, introvae and twod the file holds",
            )
    return table


def to_ours(family: Family, published: Mapping[str, T]) -> dict[str, T]:
    """A published state dict (or any mapping by published names) under our names; dropped entries are left out."""
    table = names(family, published.keys())
    return {table[key]: value for key, value in published.items() if key in table}


def settings(family: Family, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields of ResidualConfig (residual, introvae) or MlpConfig (twod) that give these published shapes.

    `block` and `input_range` follow from the family, everything else from the shapes; whether equal wide stages have a
    1x1 skip is decided by the presence of its key. Raises UserError when the shapes do not fit together.
    """
    try:
        return _twod_settings(shapes) if family == "twod" else _residual_settings(family, shapes)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"the entries do not make up a published {family} network ({type(error).__name__}: {error})",
            "check which of residual, introvae and twod the file holds",
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

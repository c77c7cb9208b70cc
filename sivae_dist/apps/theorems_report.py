"""The theorems' table and figure: bars of what play reached beside what the theorems say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sivae_dist.apps import theorems
from sivae_dist.apps.sheet import sheet
from sivae_dist.evaluation.grids import Pixels, save_png

DATA = (0.3, 0.25, 0.2, 0.15, 0.1)  # p_data of the figure
GAMMAS = (0.0, 0.25, 0.5, 1.0)
MARGINS = (0.5, 1.0, 4.0)
ALPHA = 2.0
_GREY, _ORANGE, _BLUE = (170, 170, 170), (230, 140, 40), (31, 95, 168)
_HEIGHT, _BAR, _GAP = 160, 9, 14


def report(out: Path, *, seed: int = 0) -> str:
    """Plays all games, writes out/theorems.png, returns a table in Markdown."""
    p_data = torch.tensor(DATA, dtype=theorems.DOUBLE)
    soft = {gamma: theorems.soft_introvae(p_data, alpha=ALPHA, gamma=gamma, seed=seed) for gamma in GAMMAS}
    hinge = {margin: theorems.introvae(p_data, margin=margin, seed=seed) for margin in MARGINS}
    lines = [
        f"p_data = {DATA}, alpha = {ALPHA:g}, seed {seed}",
        "",
        "| Soft-IntroVAE, gamma | proviso holds | TV(p_d, optimum) | KL + gamma H reached | least | q from posterior "
        "| gain of the encoder alone | of the decoder alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gamma, r in soft.items():
        lines.append(
            f"| {gamma:g} | {'yes' if r.condition <= 0 else 'no'} | {r.distance:.1e} | {r.objective[0]:.6f} "
            f"| {r.objective[1]:.6f} | {r.posterior_gap:.1e} | {r.gains[0]:.1e} | {r.gains[1]:.1e} |"
        )
    lines += [
        "",
        "| IntroVAE, m | TV(p_G, p_data) | E, least | E, largest | gap | TV of plain steps |",
        "|---" * 6 + "|",
    ]
    for margin, h in hinge.items():
        lines.append(
            f"| {margin:g} | {h.distance:.1e} | {float(h.energy.min()):.6f} | {float(h.energy.max()):.6f} "
            f"| {h.gap:.1e} | {h.circling:.2f} |"
        )
    save_png(out / "theorems.png", figure(p_data, soft, hinge))
    return "\n".join(lines)


def figure(
    p_data: Tensor, soft: dict[float, theorems.SoftEquilibrium], hinge: dict[float, theorems.HingeSaddle]
) -> Pixels:
    """One row a theorem, one panel for each gamma or m."""
    first = [bars([p_data, r.optimum, r.decoder]) for r in soft.values()]
    second = [bars([p_data, h.generator, h.energy / margin]) for margin, h in hinge.items()]
    captions = [
        [
            f"gamma {g:g}: proviso {'holds' if r.condition <= 0 else 'fails'}, TV {r.distance:.0e}"
            for g, r in soft.items()
        ],
        [f"m {m:g}: E = {float(h.energy.mean()):.3f}, TV {h.distance:.0e}" for m, h in hinge.items()],
    ]
    title = (
        "Above, Soft-IntroVAE: p_data grey, minimiser of KL + gamma H orange, p_d reached by play blue. "
        "Below, IntroVAE: p_data grey, p_G orange, E / m blue. One group a state, full height is 1."
    )
    return sheet([first, second], title=title, row_labels=["Soft-IntroVAE", "IntroVAE"], captions=captions)


def bars(series: Sequence[Tensor]) -> Pixels:
    """Grouped bars of values in [0, 1]: three series (X,) side by side at each x."""
    states = len(series[0])
    group = len(series) * _BAR + _GAP
    picture = np.full((_HEIGHT + 2, max(states * group + _GAP, 260), 3), 255, dtype=np.uint8)
    picture[-2:] = 60
    for k, (values, colour) in enumerate(zip(series, (_GREY, _ORANGE, _BLUE), strict=True)):
        for i, value in enumerate(values.tolist()):
            left = _GAP + i * group + k * _BAR
            top = _HEIGHT - round(min(max(value, 0.0), 1.0) * _HEIGHT)
            picture[top:_HEIGHT, left : left + _BAR - 1] = colour
    return picture

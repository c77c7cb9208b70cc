"""Pictures and what a trained model makes of them, with figures."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sivae_dist.apps.output import claim, write_aside
from sivae_dist.apps.sheet import sheet
from sivae_dist.apps.sources import Picture, described, image_range, pictures
from sivae_dist.engine.load import Noise, Trained
from sivae_dist.evaluation.grids import Pixels, cells, save_png
from sivae_dist.evaluation.reconstruction import psnr
from sivae_dist.progress import Bar

COLUMNS = 8


@dataclass(frozen=True)
class Scores:
    """psnr: (name, dB) of each picture. adjusted: how many had to be cropped or resized. side: to which size."""

    psnr: list[tuple[str, float]]
    adjusted: int
    side: int

    @property
    def mean(self) -> float:
        """Mean of the finite ones, in dB; NaN where there are none."""
        finite = [value for _, value in self.psnr if math.isfinite(value)]
        return math.fsum(finite) / len(finite) if finite else math.nan

    @property
    def not_finite(self) -> int:
        """How many are infinite (no error at all) or NaN."""
        return sum(not math.isfinite(value) for _, value in self.psnr)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what is not finite is null."""
        return {
            "images": [{"name": name, "psnr": v if math.isfinite(v) else None} for name, v in self.psnr],
            "mean_psnr": self.mean if math.isfinite(self.mean) else None,
            "not_finite": self.not_finite,
            "cropped_or_resized": self.adjusted,
            "resolution": self.side,
        }


def reconstruct(
    trained: Trained,
    where: Sequence[str],
    out: Path,
    *,
    n: int = 16,
    shown: int = 32,
    posterior_sample: bool = False,
    seed: int = 0,
    noise: Noise = "fixed",
    label: int | None = None,
    report: Path | None = None,
    force: bool = False,
) -> Scores:
    """Reconstructs the first n pictures (0: all) of `where`; draws the first `shown`, originals above reconstructions.

    report: .csv or .json with the PSNR of every picture. label: class of all, instead of the data set's own.
    """
    input_range = image_range(trained)
    claim(out, force=force, suffixes=(".png",))
    if report is not None:
        claim(report, force=force, suffixes=(".csv", ".json"))
    scores: list[tuple[str, float]] = []
    originals: list[Pixels] = []
    copies: list[Pixels] = []
    adjusted = 0
    with Bar(desc="pictures", unit="img", disable=None, leave=False, total=n or None) as progress:
        for group in _grouped(pictures(where, trained, limit=n), trained.batch):
            x = torch.cat([picture.x for picture in group])
            labels = [picture.label if label is None else label for picture in group]
            condition = None
            if trained.model.condition_dim:
                known = None if None in labels else torch.tensor(labels)
                condition = trained.condition(known, len(group))
            elif label is not None:
                trained.condition(label, len(group))  # refuses
            x_rec = trained.reconstruct(
                x, condition, noise=noise, posterior_sample=posterior_sample, seed=seed, first=len(scores)
            ).cpu()
            wanted = max(0, shown - len(scores))
            originals.extend(cells(x[:wanted], input_range))
            copies.extend(cells(x_rec[:wanted], input_range))
            scores.extend(zip([p.name for p in group], psnr(x, x_rec, input_range).tolist(), strict=True))
            adjusted += sum(picture.changed for picture in group)
            progress.update(len(group))
    result = Scores(scores, adjusted, trained.model.sample_shape[-1])
    code = f"a draw from the posterior, seed {seed}" if posterior_sample else "the mean code"
    title = f"Originals above, reconstructions from {code} below (PSNR in dB, mean of {len(scores)}: {result.mean:.2f})"
    title += f": {described(trained, noise=noise)}"
    save_png(out, _picture(originals, copies, scores, title))
    if report is not None:
        text = _csv(result) if report.suffix.lower() == ".csv" else json.dumps(result.to_dict(), indent=2) + "\n"
        write_aside(report, lambda aside: aside.write_text(text, encoding="utf-8"))
    return result


def _picture(originals: list[Pixels], copies: list[Pixels], scores: list[tuple[str, float]], title: str) -> Pixels:
    """Pairs of rows, COLUMNS pictures wide: names below the originals, PSNR below the reconstructions."""
    rows: list[list[Pixels]] = []
    captions: list[list[str]] = []
    for i in range(0, len(originals), COLUMNS):
        part = slice(i, min(i + COLUMNS, len(originals)))
        rows += [originals[part], copies[part]]
        captions += [[name for name, _ in scores[part]], [f"{value:.2f}" for _, value in scores[part]]]
    return sheet(rows, title=title, captions=captions, row_labels=["original", "reconstruction"] * (len(rows) // 2))


def _csv(result: Scores) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["name", "psnr"])
    writer.writerows((name, f"{value:.6g}") for name, value in result.psnr)
    return text.getvalue()


def _grouped(items: Iterator[Picture], size: int) -> Iterator[list[Picture]]:
    group: list[Picture] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group

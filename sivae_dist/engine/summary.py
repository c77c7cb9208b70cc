"""summary.json: how far a run came and what it reached, for people and scripts that come after it."""

from __future__ import annotations

import time

from sivae_dist.engine.config import RunConfig
from sivae_dist.engine.resolution import Resolutions
from sivae_dist.engine.run_folder import RunFolder
from sivae_dist.engine.tracking import read_metrics


def summarise(run: RunFolder, config: RunConfig, nimg: int, *, finished: bool) -> dict[str, object]:
    """The newest value of every metric, and how the evaluation compares with the mean image and the untrained model.

    psnr_gain_over_mean_image_db: held-out reconstruction PSNR above that of the constant mean image.
    skipped: slots that got another sample than theirs, since that could not be used: all, and by reason.
    swd_ratio_to_untrained: sliced Wasserstein distance of samples, divided by that of the untrained model's,
        where both were taken at one resolution (of a network that has grown they were not).
    """
    rows = read_metrics(run.metrics)
    newest: dict[str, float] = {}
    for row in rows:
        newest |= row
    judged = [row for row in rows if "eval/swd" in row]
    untrained = next((row for row in judged if row["nimg"] == 0), {})
    grids = sorted(run.samples.glob("nimg-*.png"))
    grids = [path for path in grids if path.stem[5:].isdecimal() and int(path.stem[5:]) <= nimg]  # none of a later past
    summary: dict[str, object] = {
        "finished": finished,
        "nimg": nimg,
        "kimg": nimg / 1000,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "metrics": {key: value for key, value in newest.items() if key != "nimg"},
        "grid": str(grids[-1].relative_to(run.root)) if grids else None,
    }
    lost = {key.removeprefix("data/skipped"): int(value) for key, value in newest.items() if "data/skipped" in key}
    summary["skipped"] = {name.removeprefix("_") or "all": count for name, count in lost.items()}
    if "eval/psnr" in newest:
        summary["psnr_gain_over_mean_image_db"] = newest["eval/psnr"] - newest["eval/psnr_mean_image"]
    resolutions = Resolutions(config)
    if untrained and len({resolutions.of(int(row["nimg"]), row) for row in (untrained, judged[-1])}) == 1:
        summary["swd_untrained"] = untrained["eval/swd"]
        summary["swd_ratio_to_untrained"] = newest["eval/swd"] / untrained["eval/swd"]
    return summary

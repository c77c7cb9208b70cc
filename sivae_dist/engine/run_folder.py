"""The run folder: names of everything a run writes, and writes that are never seen half done."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from sivae_dist import __version__
from sivae_dist.errors import UserError

PACKAGES = (
    "torch",
    "accelerate",
    "deepspeed",
    "webdataset",
    "numpy",
    "tensorboard",
    "safetensors",
    "pillow",
    "simplejpeg",
)


class RunFolder:
    """Paths inside `runs/NAME/`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    config = property(lambda self: self.root / "config.yaml")
    manifest = property(lambda self: self.root / "manifest.json")
    metrics = property(lambda self: self.root / "metrics.jsonl")
    fingerprints = property(lambda self: self.root / "fingerprints.jsonl")
    summary = property(lambda self: self.root / "summary.json")
    tensorboard = property(lambda self: self.root / "tensorboard")
    samples = property(lambda self: self.root / "samples")
    checkpoints = property(lambda self: self.root / "checkpoints")
    logs = property(lambda self: self.root / "logs")

    def create(self) -> None:
        """Makes the folders. Raises UserError when the place cannot be written."""
        try:
            for path in (self.tensorboard, self.samples, self.checkpoints, self.logs):
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write the run folder {self.root}: {error}", "choose another place with --out"
            ) from error


def environment() -> dict[str, object]:
    """Versions that a result depends on: this code, Python, packages."""
    import torch  # noqa: PLC0415 (names alone are had without)

    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    packages["torch"] = torch.__version__  # with the build, as in 2.13.0+cpu, which the package's name may lack
    return {
        "sivae_dist": __version__,
        "revision": _revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "argv": sys.argv,
    }


def _revision() -> str | None:
    """Git revision of the checkout that this code runs from, with `+` when it has uncommitted changes."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    git = ["git", "-C", str(here)]
    try:
        head, dirty = (
            subprocess.run([*git, *words], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if dirty else "")

"""Where the shipped folders are: inside the package after an installation, beside it in a checkout.

They are found by path and never imported: a checkout's `kernels/` is no package, and the name belongs to another
project on PyPI.
"""

from __future__ import annotations

from pathlib import Path

from sivae_dist.errors import UserError


def _folder(name: str, package: Path) -> Path:
    """The folder `name` for a package lying at `package`: packaged data first, else the sibling in a checkout.

    A sibling counts only beside a pyproject.toml: in site-packages a sibling `kernels` is somebody else's package.
    """
    places = [package / f"_{name}", package.parent / name]
    if places[0].is_dir():
        return places[0]
    if places[1].is_dir() and (package.parent / "pyproject.toml").is_file():
        return places[1]
    raise UserError(
        f"the folder {name}/ of sivae-dist is missing: neither {places[0]} nor {places[1]} exists",
        "reinstall the package (pip install --force-reinstall --no-deps sivae-dist) or take a complete checkout",
    )


def configs_dir() -> Path:
    """The folder of the recipes (YAML). Raises UserError when the installation lacks it."""
    return _folder("configs", Path(__file__).resolve().parent)


def kernels_dir() -> Path:
    """The folder of the kernels' sources, one sub-folder an op. Raises UserError when the installation lacks it."""
    return _folder("kernels", Path(__file__).resolve().parent)

"""Packaging. Metadata stands in pyproject.toml; what needs code (packages, shipped data) stands here.

Packages are listed because discovery refuses a checkout with several top-level folders. `kernels/` and `configs/` are
not packages (a top-level `kernels` would collide with the package of that name on PyPI): wheels carry them as data,
`sivae_dist/_kernels` and `sivae_dist/_configs`, and `sivae_dist.resources` finds them by path, in a wheel as in a
checkout.

With SIVAE_BUILD_KERNELS=1 the kernels are compiled now, into `sivae_dist._C` (needs torch, so `--no-build-isolation`).
Without it they are compiled where they first run.
"""

import os
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
KERNELS = os.environ.get("SIVAE_BUILD_KERNELS", "0") not in {"", "0"}
SHIPPED = {"kernels": "sivae_dist/_kernels", "configs": "sivae_dist/_configs"}


def shipped() -> list[tuple[str, str]]:
    """(source, target below the build folder) of every file of the shipped folders, in a stable order."""
    pairs = []
    for folder, target in SHIPPED.items():
        for path in sorted((ROOT / folder).rglob("*")):
            inside = path.relative_to(ROOT / folder)
            hidden = any(part.startswith((".", "__pycache__")) for part in inside.parts)
            if path.is_file() and not hidden:
                pairs.append((path.relative_to(ROOT).as_posix(), f"{target}/{inside.as_posix()}"))
    return pairs


class BuildPy(build_py):
    """The stock command, which also lays the shipped folders into the package (a checkout is left as it is)."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in shipped():
                destination = Path(self.build_lib) / target
                self.mkpath(str(destination.parent))
                self.copy_file(str(ROOT / source), str(destination))
        if KERNELS:
            build_kernels(ROOT / "sivae_dist" if self.editable_mode else Path(self.build_lib) / "sivae_dist")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        extra = [] if self.editable_mode else [str(Path(self.build_lib) / target) for _, target in shipped()]
        if KERNELS and not self.editable_mode:
            extra += [str(Path(self.build_lib) / "sivae_dist" / name) for name in ("_C.abi3.so", "_C.json")]
        return [*super().get_outputs(include_bytecode), *extra]

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *(source for source, _ in shipped())]


class Platform(Distribution):
    """Says that the wheel holds compiled code where it does."""

    def has_ext_modules(self) -> bool:
        return KERNELS


def build_kernels(package: Path) -> None:
    """Compiles the kernels into a package folder, by the same steps as at run time."""
    sys.path.insert(0, str(ROOT))
    try:
        import torch  # noqa: F401
    except ImportError:
        sys.exit("error: SIVAE_BUILD_KERNELS=1 needs torch while building\n  fix: pip install --no-build-isolation .")
    from sivae_dist.ops import _ahead
    from sivae_dist.ops._toolchain import UnavailableError

    try:
        device = _ahead.make(package, ROOT / "build" / "kernels")
    except UnavailableError as error:
        sys.exit(f"error: SIVAE_BUILD_KERNELS=1, but {error.why}\n  fix: {error.fix}, or install without it")
    print(f"built the {device} kernels into {package}")


setup(
    packages=find_packages(include=["sivae_dist", "sivae_dist.*"]),
    package_data={"sivae_dist": ["py.typed"]},
    cmdclass={"build_py": BuildPy},
    distclass=Platform,
)

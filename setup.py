"""Packaging. Metadata stands in pyproject.toml; what needs code (packages, shipped data) stands here.

Packages are listed because discovery refuses a checkout with several top-level folders. `kernels/` and `configs/` are
not packages (a top-level `kernels` would collide with the package of that name on PyPI): wheels carry them as data,
`sivae_dist/_kernels` and `sivae_dist/_configs`, and `sivae_dist.resources` finds them by path, in a wheel as in a
checkout.
"""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
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

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        extra = [] if self.editable_mode else [str(Path(self.build_lib) / target) for _, target in shipped()]
        return [*super().get_outputs(include_bytecode), *extra]

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *(source for source, _ in shipped())]


setup(
    packages=find_packages(include=["sivae_dist", "sivae_dist.*"]),
    package_data={"sivae_dist": ["py.typed"]},
    cmdclass={"build_py": BuildPy},
)

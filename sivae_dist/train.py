"""`accelerate launch [flags] -m sivae_dist.train --config configs/NAME.yaml [--section.key value ...]`.

Once this module is imported, Python makes it the attribute `train` of the package, where the function of that name was:
so the module can be called, and is that function.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from sivae_dist.cli.errors import guarded


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """`sivae_dist.engine.run.train`, see there."""
        from sivae_dist.engine.run import train  # noqa: PLC0415 (loads torch)

        return train(*arguments, **options)


def _train(arguments: list[str]) -> None:
    from sivae_dist.cli.train import run  # noqa: PLC0415 (loads torch: inside the guard, which tells of a broken one)

    run(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `python -m sivae_dist.train`."""
    guarded(_train, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
else:
    sys.modules[__name__].__class__ = _Callable

"""Extension by dropping a file: every config dataclass in a folder is found by its `name`.

A component (architecture, objective, dataset) is one module that defines a frozen dataclass deriving from its folder's
base config, with `name: str = "residual"` as first field and a `build(...)` method. Nothing is registered by hand:
the folder's modules are imported and the subclasses of the base are collected.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import fields

from sivae_dist.errors import UserError, nearest


@functools.cache
def components(package: str, base: type) -> dict[str, type]:
    """All subclasses of `base` defined in the modules of `package`, by the default of their field `name`."""
    folder = importlib.import_module(package)
    for info in pkgutil.iter_modules(folder.__path__, prefix=f"{package}."):
        importlib.import_module(info.name)
    found: dict[str, type] = {}
    todo: list[type] = list(base.__subclasses__())
    while todo:
        cls = todo.pop()
        todo.extend(cls.__subclasses__())
        if not cls.__module__.startswith(f"{package}."):
            continue
        name = next(f.default for f in fields(cls) if f.name == "name")
        if found.setdefault(str(name), cls) is not cls:
            raise TypeError(f"{cls.__module__} and {found[str(name)].__module__} both call themselves {name!r}")
    return dict(sorted(found.items()))


def component(package: str, base: type, name: str, *, kind: str) -> type:
    """The config class called `name`. Raises UserError naming the nearest valid one."""
    known = components(package, base)
    if name not in known:
        raise UserError(f"{kind}.name is {name!r}, which is not known", nearest(name, known))
    return known[name]

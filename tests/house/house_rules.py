"""The rules of the house as functions: each takes a folder or a parsed file and returns what breaks the rule."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "sivae_dist"
FOUNDATION = {"errors", "registry", "counters", "devices", "files", "progress", "resources"}
MIDDLE = {"objectives", "models", "data", "distributed", "evaluation", "interop"}
# Higher imports lower or equal, never the other way. `__init__` is the package's own file: the API on top of all.
LAYER = (
    dict.fromkeys(FOUNDATION, 0)
    | {"ops": 1}
    | dict.fromkeys(MIDDLE, 2)
    | dict.fromkeys(("apps", "engine"), 3)
    | dict.fromkeys(("cli", "train", "__main__", "__init__"), 4)
)
# Rooms with a shorter list than their layer would give them.
OBJECTIVES_MAY = {"torch", *sys.stdlib_module_names}
DISTRIBUTED_MAY = {"distributed", "ops", *FOUNDATION}

UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load",
    "yaml.load_all",
}
MAKES_GROUPS = {
    "init_process_group",
    "new_group",
    "new_subgroups",
    "new_subgroups_by_enumeration",
    "split_group",
}
AMBIGUOUS_NAMES = {"D", "G", "netD", "netG"}


def python_files(root: Path) -> list[Path]:
    """Every .py file below root/sivae_dist."""
    return sorted(path for path in (root / PACKAGE).rglob("*.py") if "__pycache__" not in path.parts)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(tree: ast.Module, path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, wherever it stands; relative ones resolved, `from a import b` as a.b."""
    here = path.relative_to(root).with_suffix("").parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def room(module: str) -> str | None:
    """The room of a dotted module of ours ('sivae_dist.models.base' -> 'models'), None for others' modules."""
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return None
    return parts[1] if len(parts) > 1 else "__init__"


def import_violations(root: Path) -> list[str]:
    """Imports that go upwards, leave a room's own short list, or close a circle between rooms of the middle layer."""
    bad: list[str] = []
    edges: dict[str, set[str]] = {}
    for path in python_files(root):
        source = path.relative_to(root / PACKAGE).with_suffix("").parts[0]
        if source not in LAYER:
            bad.append(f"{path.relative_to(root)}: no layer is known for {source!r}; give it one in house_rules.LAYER")
            continue
        for line, module in imported(parse(path), path, root):
            where = f"{path.relative_to(root)}:{line}: {source} imports {module}"
            target = room(module)
            if target is None:
                if source == "objectives" and module.split(".")[0] not in OBJECTIVES_MAY:
                    bad.append(f"{where}; objectives import only torch and the standard library")
                continue
            if target == "__version__":
                continue
            if target not in LAYER:
                bad.append(f"{where}, which has no layer; import from the module that defines it")
            elif source == "objectives" != target:
                bad.append(f"{where}; objectives import nothing of ours but each other")
            elif source == "distributed" and target not in DISTRIBUTED_MAY:
                bad.append(f"{where}; distributed knows no VAE")
            elif LAYER[target] > LAYER[source]:
                bad.append(f"{where}, which lies above it")
            elif {source, target} <= MIDDLE and source != target:
                edges.setdefault(source, set()).add(target)
    return bad + [f"rooms import each other in a circle: {' -> '.join(circle)}" for circle in circles(edges)]


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """One circle for each room that can reach itself."""
    found = []
    for start in sorted(edges):
        paths = [[start]]
        seen: set[str] = set()
        while paths:
            way = paths.pop()
            for following in sorted(edges.get(way[-1], ())):
                if following == start:
                    found.append([*way, start])
                    paths.clear()
                    break
                if following not in seen:
                    seen.add(following)
                    paths.append([*way, following])
    return found


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _is_true(call: ast.Call, name: str) -> bool:
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is True for k in call.keywords)


def unsafe_uses(tree: ast.Module) -> list[str]:
    """What could let data that was read run as code: unpickling, eval, a shell, full YAML."""
    bad: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                bad += [
                    f"line {node.lineno}: imports {name}" for name in sorted(full & (UNSAFE_CALLS | {"torch.load"}))
                ]
            bad += [f"line {node.lineno}: imports {m}" for m in modules if m.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.Call):
            name = _dotted(node.func)
            if name in UNSAFE_CALLS:
                bad.append(f"line {node.lineno}: calls {name}")
            if name == "torch.load" and not _is_true(node, "weights_only"):
                bad.append(f"line {node.lineno}: calls torch.load without weights_only=True")
            if any(k.arg in ("shell", "allow_pickle") and not _is_false(k.value) for k in node.keywords):
                bad.append(f"line {node.lineno}: passes shell or allow_pickle")
    return bad


def groups_without_timeout(tree: ast.Module) -> list[str]:
    """Process groups that would wait as long as torch pleases, whatever `distributed.timeout_s` says."""
    bad: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = _dotted(node.func).rpartition(".")[2]
            without = name in MAKES_GROUPS and all(k.arg != "timeout" for k in node.keywords)
            if without or name == "init_device_mesh":  # which takes none; DeviceMesh.from_group makes no groups
                bad.append(f"line {node.lineno}: {name} without a timeout")
    return bad


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def ambiguous_names(tree: ast.Module) -> list[str]:
    """Identifiers D, G, netD, netG: a decoder here and a discriminator in every GAN codebase."""
    bad: list[str] = []
    for node in ast.walk(tree):
        names = {
            ast.Name: lambda n: [n.id],
            ast.Attribute: lambda n: [n.attr],
            ast.arg: lambda n: [n.arg],
            ast.keyword: lambda n: [n.arg],
            ast.alias: lambda n: [n.asname],
            ast.FunctionDef: lambda n: [n.name],
            ast.ClassDef: lambda n: [n.name],
        }.get(type(node), lambda n: [])(node)
        bad += [f"line {getattr(node, 'lineno', '?')}: {name}" for name in names if name in AMBIGUOUS_NAMES]
    return bad


def project_files(root: Path) -> list[Path]:
    """The files of the project: what git tracks or would track; without git (an unpacked sdist) all but caches."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=False,
    )
    if listing.returncode == 0 and (root / ".git").exists():
        names = [name for name in listing.stdout.decode().split("\0") if name]
        return [root / name for name in names if (root / name).is_file()]
    skip = {"__pycache__", ".venv", "build", "dist", "runs"}
    return [p for p in sorted(root.rglob("*")) if p.is_file() and not skip & set(p.relative_to(root).parts)]


def mentions(paths: list[Path], needles: list[str]) -> list[str]:
    """Lines of text files that contain one of the needles."""
    bad: list[str] = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        bad += [f"{path}:{n}: {needle}" for n, line in enumerate(lines, 1) for needle in needles if needle in line]
    return bad

"""The command line: `sivae-dist COMMAND ...`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from sivae_dist.cli.errors import guarded
from sivae_dist.errors import UserError, nearest

_APART = {
    "train": "Train a model; the same command again resumes the run.",
    "doctor": "Look at the machine, the installation and your data for what would stop a run.",
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    guarded(_run, sys.argv[1:] if arguments is None else arguments)


def commands() -> dict[str, Callable[..., object]]:
    """All commands by name; a typed function each, whose signature is its command line."""
    # Here and below: the imports of one command must not cost another.
    from sivae_dist.cli import (  # noqa: PLC0415
        bench,
        checkpoint,
        compare,
        data,
        diff,
        evaluate,
        import_published,
        look,
        memory,
        scenes,
        suggest,
        toy,
    )

    parts = (data, scenes, evaluate, compare, diff, checkpoint, look, suggest, memory, bench, toy, import_published)
    return {name: command for part in parts for name, command in part.COMMANDS.items()}


def _run(arguments: list[str]) -> None:
    if arguments[:1] == ["train"]:
        from sivae_dist.cli import train  # noqa: PLC0415

        train.run(arguments[1:])
        return
    if arguments[:1] == ["doctor"]:  # apart from the others: it must run where hardly anything else can
        from sivae_dist.cli import doctor  # noqa: PLC0415

        doctor.run(arguments[1:])
        return
    if arguments[:1] == ["--version"]:
        from sivae_dist import __version__  # noqa: PLC0415

        print(__version__)
        return
    known = commands()
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in known:
            import tyro  # noqa: PLC0415

            tyro.cli(known[name], prog=f"sivae-dist {name}", args=arguments[words:], use_underscores=False)
            return
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(_overview(known))
        return
    group = {name: function for name, function in known.items() if name.startswith(f"{arguments[0]} ")}
    if group and (len(arguments) == 1 or arguments[1] in {"-h", "--help"}):
        print(_overview(group, arguments[0]))
        return
    raise UserError(
        f"there is no command {' '.join(arguments[:2])!r}", nearest(" ".join(arguments[:2]), [*_APART, *known])
    )


def _overview(known: dict[str, Callable[..., object]], group: str = "") -> str:
    """What there is; group: commands of two words that begin with this one."""
    rows = {name: (function.__doc__ or "").strip().splitlines()[0] for name, function in known.items()}
    rows = rows if group else _APART | rows
    width = max(map(len, rows)) + 2
    lines = [f"  {name:<{width}}{text}" for name, text in rows.items()]
    usage = f"usage: sivae-dist {f'{group} ' if group else ''}COMMAND [options]"
    return f"{usage}     (--help after a command tells its options)\n\n" + "\n".join(lines)

"""Command line of training: a YAML of differences, then single settings on top."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from sivae_dist.cli.errors import guarded
from sivae_dist.engine.config import NAMED, RunConfig, from_dict, merge, read_yaml, to_dict, to_yaml

PROG = "sivae-dist train"
TELL_S = 15.0  # the first rank to end makes the launcher end the others: time for rank 0 to tell and end first


@dataclass(frozen=True)
class TrainCommand:
    """Train a model. The same command again resumes the run.

    Under several processes: accelerate launch [flags] -m sivae_dist.train --config ... (same options).
    """

    # Settings take their value in words (True, False); only the switches below are switches.
    run: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    config: str | None = None
    """YAML file with this run's differences from the defaults (see configs/)."""
    out: str | None = None
    """Run folder; runs/NAME after the config file's name when not given."""
    resume: str = "auto"
    """auto: go on from the run's latest checkpoint if there is one. never: refuse a folder that holds a run.
    PATH: go on from that checkpoint; the same command again goes on from what it has trained since."""
    print_config: bool = False
    """Print the resolved configuration as YAML and stop."""
    dry_run: bool = False
    """Build everything, do one step of each phase on real data, print sizes, times and the plan of the run, and stop.
    Writes nothing."""


def parse(arguments: list[str]) -> TrainCommand:
    """The command with its configuration: defaults, then the YAML file, then the command line.

    Raises UserError for what is wrong in the YAML; leaves with a message and status 2 for a wrong option.
    """
    path = _option(arguments, "--config")
    values = read_yaml(Path(path)) if path else {}
    # The classes of the named sections must be known before their options can be.
    names = {section: {"name": name} for section in NAMED if (name := _option(arguments, f"--{section}.name"))}
    run = from_dict(merge(values, names), path or "the command line")
    default = TrainCommand(run, config=path)
    teller = os.environ.get("RANK", "0") == "0"  # all ranks have the same options: one of them tells what is wrong
    try:
        command: TrainCommand = tyro.cli(
            TrainCommand,
            prog=PROG,
            args=_capitalised(arguments, run),
            default=default,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands),
            use_underscores=True,
            console_outputs=teller,
        )
    except SystemExit:
        if not teller:
            time.sleep(TELL_S)
        raise
    # Once more through the checks of values from files: numbers must be finite and of bounded size here, too.
    return replace(command, run=from_dict(to_dict(command.run), "the command line"))


def _option(arguments: list[str], name: str) -> str | None:
    """The value of an option before the real parser runs; the last one given wins."""
    value = None
    for index, argument in enumerate(arguments):
        if argument == name and index + 1 < len(arguments):
            value = arguments[index + 1]
        elif argument.startswith(f"{name}="):
            value = argument.removeprefix(f"{name}=")
    return value


def _capitalised(arguments: list[str], run: RunConfig) -> list[str]:
    """true and false, as YAML writes them, in Python's spelling wherever a switch of `run` is set."""
    words = {"true": "True", "false": "False"}
    result = list(arguments)
    for index, argument in enumerate(arguments):
        name, joined, value = argument.partition("=")
        if not name.startswith("--") or not isinstance(_setting(run, name[2:]), bool):
            continue
        if joined:
            result[index] = f"{name}={words.get(value, value)}"
        elif index + 1 < len(arguments):
            result[index + 1] = words.get(arguments[index + 1], arguments[index + 1])
    return result


def _setting(run: RunConfig, name: str) -> object:
    """The value of `section.key`, None where there is no such setting."""
    value: object = run
    for part in name.replace("-", "_").split("."):
        value = getattr(value, part, None)
    return value


def run(arguments: list[str]) -> None:
    """Parses and trains."""
    command = parse(arguments)
    if command.print_config:
        print(to_yaml(command.run), end="")
        return
    from sivae_dist.engine.run import train  # noqa: PLC0415 (--help and --print-config stay quick)

    out = command.out or f"runs/{Path(command.config).stem if command.config else command.run.model.name}"
    train(command.run, out, command.resume, dry_run=command.dry_run)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `python -m sivae_dist.train`."""
    guarded(run, sys.argv[1:] if arguments is None else arguments)

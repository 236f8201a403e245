"""``fedlight --print_completion SHELL``: a script that completes commands, keys, classes, configurations."""

import argparse
from collections.abc import Mapping, Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.cli.classes import class_names
from fedlight.cli.configs import configs, part_names


def script(args: Sequence[str], parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """The script of a shell.

    Args:
        args: the shell: bash, zsh or tcsh.
        parsers: those of the commands that take a configuration.

    Raises:
        MisconfigurationException: for another shell, or without shtab.
    """
    try:
        import shtab
    except ModuleNotFoundError as error:
        message = '--print_completion needs shtab: pip install "fedlight[completion]"'
        raise MisconfigurationException(message) from error
    if len(args) != 1 or args[0] not in shtab.SUPPORTED_SHELLS:
        raise MisconfigurationException(f"--print_completion takes one of {', '.join(shtab.SUPPORTED_SHELLS)}.")
    values: dict[str, list[str]] = {"config": list(configs()), "ckpt_path": ["last", "best"]}
    for name, key in (class_names() | part_names()).items():
        values.setdefault(key.removesuffix("+"), []).append(name)
    parser = argparse.ArgumentParser("fedlight", add_help=False)
    below = parser.add_subparsers()
    for name, known in parsers.items():
        command = below.add_parser(name, add_help=False, help=name)  # shtab leaves out those without
        for action in known._actions:
            choices = values.get(action.dest.removesuffix(".help")) or action.choices
            command.add_argument(*action.option_strings, dest=action.dest, choices=choices)
    for name in ("study", "report"):
        below.add_parser(name, help=name).add_argument("path").complete = shtab.FILE  # type: ignore[attr-defined]
    for name, key in (("configs", "config"), ("check-fidelity", "algorithm")):
        below.add_parser(name, help=name).add_argument("name", choices=values[key])
    below.add_parser("new", help="new")
    below.add_parser("deploy", help="deploy").add_argument("target", choices=["flower"])
    return str(shtab.complete(parser, args[0]))

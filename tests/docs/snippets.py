"""The code blocks of the documentation, read and run.

Blocks of a page share one namespace and one folder, and run in the order of the page: Python is executed (a block with
``title="name.py"`` is written to that file as well), YAML is read by ``fedlight fit`` or ``fedlight study``, and
commands of fedlight and ``python FILE`` run in this process, for a round of a batch. Above a block may stand

    <!-- parsed only: why -->   its commands are parsed, its Python compiled, and nothing runs
    <!-- first ... -->          what the page takes for granted: Python, or commands after ``$ ``
"""

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import yaml

from fedlight.cli.command import FederatedCLI, main
from fedlight.cli.light import command_first, light

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- (parsed only|first)\b:?(.*?)-->\n)|^```(\w*)([^\n]*)\n(.*?)^```$", re.M | re.S)
QUICK = {
    "max_rounds": 1, "limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1, "devices": 1,
    "client_val_every_n_rounds": 1, "accelerator": "cpu", "enable_progress_bar": "false",
}  # fmt: skip
TRAINED = ("trainer", "model", "data", "algorithm", "perturbation", "seed_everything")


@dataclass
class Block:
    """A code block: its language, title, text and line, whether it may run, and whether the page shows it."""

    language: str
    title: str
    text: str
    line: int
    runs: bool = True
    shown: bool = True


def blocks(page: Path) -> list[Block]:
    text, found, parsed_only = page.read_text(), [], False
    for match in BLOCK.finditer(text):
        kind, said, language, info, code = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        if kind == "parsed only":
            assert said.strip(), f"{page.name}:{line}: say why this is not run"
            parsed_only = True
        elif kind == "first":
            language = "bash" if said.lstrip().startswith("$ ") else "python"
            found.append(Block(language, "", re.sub(r"^\$ ", "", said.strip(), flags=re.M), line, shown=False))
        else:
            title = re.search(r'title="([^"]*)"', info)
            found.append(Block(language, title[1] if title else "", code, line, not parsed_only))
            parsed_only = False
    return found


def commands(block: Block) -> list[list[str]]:
    """The commands of a block of shell lines, as lists of words; loops and ends of lines are undone."""
    text = re.sub(r"\\\n\s*", " ", block.text)
    lines = []
    for line in re.sub(r"(?:^|\s)#.*", "", text, flags=re.M).replace("$seed", "0").splitlines():
        if not re.match(r"\s*(for|do|done)\b", line):
            lines += [shlex.split(part) for part in line.split(" && ") if part.strip()]
    return lines


def fedlight_arguments(words: list[str]) -> list[str] | None:
    """What follows ``fedlight`` in a command, however that is started; None if it is another program."""
    while words and "=" in words[0] and not words[0].startswith("-"):
        words = words[1:]
    for at, word in enumerate(words):
        if word == "fedlight" and (at == 0 or words[at - 1] == "-m"):
            return words[at + 1 :]
    return None


class Parser:
    """Reads commands of fedlight without running them; the parser of each subcommand is built once."""

    def __init__(self):
        self.of, self.known = {}, set()

    def parse(self, arguments: list[str]) -> None:
        command = arguments[0] if arguments else ""
        if tuple(arguments) in self.known:
            return
        self.known.add(tuple(arguments))
        if command == "study":
            run_here([*arguments, "--dry-run"])
        elif command in FederatedCLI.subcommands() and not any(a.endswith("help") for a in arguments):
            words = [command, *known(arguments[1:])]
            if command in self.of:
                self.of[command].parse_args(words)
            else:
                self.of[command] = Silent(words).parser
        # all else says by its own exit code whether it was understood, and runs in the slow test


def known(arguments: list[str]) -> list[str]:
    """The arguments without what ends parsing; a file that the reader is to write is the quickstart here."""
    found = [a for a in arguments if a != "--print_config"]
    for i, argument in enumerate(found[:-1]):
        file = Path(found[i + 1])
        if argument == "-c" and file.suffix == ".yaml" and not file.exists() and file.parts[0] != "configs":
            found[i + 1] = "configs/quickstart.yaml"
    return found


class Silent(FederatedCLI):
    """Parses and stops there."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def links(folder: Path) -> None:
    """Make a folder one in which commands find what they find in the repository's root, and images."""
    for name in ("configs", "sweeps", "examples", "benchmarks", "docs"):
        (folder / name).symlink_to(REPOSITORY / name)
    rng = np.random.default_rng(0)
    splits = {"train": 200, "test": 100}
    x = {f"x_{split}": rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for split, n in splits.items()}
    np.savez(folder / "cifar100.npz", **x, **{f"y_{split}": np.arange(n) % 100 for split, n in splits.items()})


def quick(arguments: list[str]) -> list[str]:
    """The command, for one round of one batch of each client."""
    if arguments[:1] == ["study"]:
        few = [] if {"--only", "--dry-run"} & {*arguments} else ["--only", "seed_everything=0"]
        return [*arguments, *few]
    if arguments[:1] == ["check-fidelity"]:
        return [*arguments, "FedAvg"]
    if arguments[:1] not in (["fit"], ["test"], ["validate"]) or any(a.endswith("help") for a in arguments):
        return arguments
    short = {**QUICK, "max_rounds": 2 if "--ckpt_path" in arguments else 1}
    if "--trainer.devices" in arguments:
        del short["devices"]
    return [*arguments, *(f"--trainer.{key}={value}" for key, value in short.items())]


def run_here(arguments: list[str]) -> str:
    """Run a command of fedlight in this process, and return what it printed; a failure is an error."""
    out, said, words = StringIO(), StringIO(), command_first(quick(arguments))
    sys.path.insert(0, os.getcwd())  # as the program does
    try:
        with redirect_stdout(out), redirect_stderr(said), argv(["fedlight", *words]):
            code = light(words)
            if code is None:
                main(words)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.path.remove(os.getcwd())
    assert not code, f"fedlight {shlex.join(arguments)} ended with {code}:\n{out.getvalue()}\n{said.getvalue()}"
    return out.getvalue()


def run_command(words: list[str], folder: Path) -> str:
    """Run one command and return what it printed; anything but success is an error."""
    written = words.index(">") if ">" in words else None
    target = words[written + 1] if written else None
    words = words[:written]
    arguments = fedlight_arguments(words)
    out = StringIO()
    if arguments is None and words[0] == "python":
        with redirect_stdout(out), argv(words[1:]):
            runpy.run_path(words[1], run_name="__main__")
    elif arguments is None and words[0] == "cd":
        os.chdir(words[1])
    elif arguments is None and words[0] in ("ls", "cat", "pip", "make", "wandb"):  # not ours to try
        return ""
    elif arguments is None:
        raise AssertionError(f"{words[0]} is no command of fedlight: mark the block as parsed only")
    elif "--trainer.devices" in words or words[0] != "fedlight":  # processes of its own
        environment = [word for word in words if re.match(r"[A-Z_]+=", word)]
        start = words[words.index("torchrun") + 1 : words.index("-m")] if "torchrun" in words else None
        python = [sys.executable, *([] if start is None else ["-m", "torch.distributed.run", *start]), "-m", "fedlight"]
        command = ["env", *environment, *python, *quick(arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(words)}:\n{done.stdout}\n{done.stderr}"
        out.write(done.stdout)
    else:
        out.write(run_here(arguments))
    if target:
        (folder / target).write_text(out.getvalue())
    return out.getvalue()


@contextmanager
def argv(words: list[str]):
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


def is_study(text: str) -> bool:
    return "parameters" in yaml.safe_load(text)


def check(block: Block, parser: Parser, folder: Path) -> None:
    """Read a block without running it."""
    if block.title and block.shown:
        (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
        (folder / block.title).write_text(block.text)
    if block.language == "python":
        ast.parse(block.text)
    elif block.language == "yaml":
        assert isinstance(yaml.safe_load(block.text), dict)
    elif block.language == "bash":
        for words in commands(block):
            arguments = fedlight_arguments(words[: words.index(">")] if ">" in words else words)
            if arguments is not None:
                parser.parse(arguments)


def run(block: Block, parser: Parser, folder: Path, names: dict) -> None:
    """Run a block."""
    check(block, parser, folder)
    if not block.runs:
        return
    if block.language == "python":
        exec(compile(block.text, block.title or f"block of line {block.line}", "exec"), names)
    elif block.language == "bash":
        for words in commands(block):
            run_command(words, folder)
        os.chdir(folder)
    elif block.language == "yaml":
        file = folder / (block.title or "block.yaml")
        file.write_text(block.text)
        content = yaml.safe_load(block.text)
        if is_study(block.text):
            parser.parse(["study", str(file)])
        elif set(content) <= set(TRAINED):
            arguments = ["fit", "-c", "configs/quickstart.yaml", "-c", str(file), "--trainer.name", "block"]
            run_command(["fedlight", *arguments], folder)

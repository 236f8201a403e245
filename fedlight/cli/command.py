"""The commands that train and evaluate, ``study`` and ``report`` about many runs, ``deploy``."""

import ast
import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace, get_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info
from torch.utils._pytree import tree_leaves
from yaml import YAMLError

import fedlight
import fedlight.callbacks
import fedlight.models
import fedlight.personal
import fedlight.perturbations
import fedlight.transforms  # all of these, so that their classes are known by their short names
from fedlight.algorithms.base import Algorithm
from fedlight.callbacks.config_file import ConfigFile
from fedlight.cli.classes import ShortHelp, class_names, completion, list_classes, nulls
from fedlight.cli.configs import mistakes, part_names, resolve_arguments, resolve_config
from fedlight.cli.light import COMMANDS, TRAINERS
from fedlight.cli.messages import readable, suggestions
from fedlight.data.datamodule import FederatedDataModule
from fedlight.perturbations.base import Perturbation
from fedlight.run.processes import exit_by_signal, raised_in
from fedlight.run.resume import usual_checkpoint
from fedlight.trainer import FederatedTrainer


class FederatedArgumentParser(LightningArgumentParser):
    """Reads values as sweep agents write them, and says briefly what it cannot read, with the nearest name."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **{"formatter_class": ShortHelp, **kwargs})

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Parse arguments; ``--key=None`` is ``--key=null``, and packaged configurations are known by their names."""
        given = sys.argv[1:] if args is None else args
        if (listed := list_classes(given)) is not None:
            print(listed)
            self.exit(0)
        try:
            resolved = resolve_arguments([yaml_argument(a) for a in given])
            self._refuse_mistakes_in_parts([a.partition("=")[2] if a.startswith("-") else a for a in resolved])
            read = super().parse_args(resolved, *others, **kwargs)
            self._refuse_misread(resolved, tree_leaves(read.as_dict()))
            return read
        except UnicodeDecodeError as error:
            self.error(f"a configuration that begins with {error.object[:60]!r} is not UTF-8: {error}; save it so")

    def parse_string(self, content: str, path: Any = "", *others: Any, **kwargs: Any) -> Any:
        """Parse a configuration, in which packaged ones may be named."""
        try:
            self._refuse_mistakes(content, path)
            config = get_loader("yaml")(content)
            if not isinstance(config, dict):
                self.error(f"{path} holds no keys, as `trainer: {{max_rounds: 30}}`, but {content[:60]!r}")
            self._refuse_mistakes_in_parts(tree_leaves(resolved := resolve_config(config)))
            if resolved != config:
                content = json.dumps(resolved)
        except YAMLError as error:
            self.error(str(error).replace("<unicode string>", str(path)))
        return super().parse_string(content, path, *others, **kwargs)

    def _refuse_mistakes(self, content: str, path: Any) -> None:
        if found := mistakes(content):
            self.error(f"{path}: {'; '.join(found)}.")

    def _refuse_misread(self, args: Sequence[str], read: list[Any]) -> None:
        words = [word for a in args for word in (a.split("=", 1) if a.startswith("-") else [a])]
        for key, value in pairwise(words):
            with suppress(YAMLError):  # a word with signs of YAML
                if value[:1] in ("{", "[") or (":" in value and value not in read):
                    self._refuse_mistakes(f"{key.lstrip('-')}: {value}", "command line")

    def _refuse_mistakes_in_parts(self, values: list[Any]) -> None:
        for value in values:
            if isinstance(value, str) and value.endswith((".yaml", ".yml")):
                with suppress(Exception):  # what cannot be read is explained where it is parsed
                    self._refuse_mistakes(Path(value).read_text(), value)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message with a suggestion, and exit with 2."""
        parsers = [p for a in self._actions for p in (getattr(a, "_name_parser_map", None) or {}).values()]
        keys = {a.dest for parser in (self, *parsers) for a in parser._actions if a.dest}
        hints = suggestions(message, keys, class_names() | part_names())
        super().error("\n  ".join([readable(message), *hints]), ex)

    def print_usage(self, file: Any = None) -> None:
        """One line: the whole list, which ``--help`` gives, would hide the message."""
        print(f"usage: {self.prog.replace(' [options]', '')} [options]", file=file)


class SaveConfig(ConfigFile, SaveConfigCallback):
    """Writes the configuration of the command line."""

    def text(self, trainer: Any, continued: bool) -> str:
        """All of it, in the order of the parser."""
        config = self.config.clone()
        if continued:
            config["ckpt_path"], config["trainer.allow_changes"] = None, False
        return str(self.parser.dump(config, skip_none=False, skip_link_targets=False))


class FederatedCLI(LightningCLI):
    """LightningCLI for :class:`~fedlight.trainer.FederatedTrainer`, with ``algorithm`` and ``perturbation`` beside it.

    ``seed_everything`` is the seed of the whole experiment (0 by default). It differs from LightningCLI where
    ``ckpt_path`` is concerned: the model comes from the configuration alone.
    """

    def __init__(self, args: ArgsType = None, run: bool = True, **kwargs: Any) -> None:
        defaults: dict[str, Any] = {
            "model_class": LightningModule,
            "datamodule_class": FederatedDataModule,
            "subclass_mode_model": "model_class" not in kwargs,
            "subclass_mode_data": "datamodule_class" not in kwargs,
            "trainer_class": FederatedTrainer,
            "save_config_callback": SaveConfig,
            "seed_everything_default": 0,
            "parser_class": FederatedArgumentParser,
            "auto_configure_optimizers": False,
        }
        given = sys.argv[1:] if args is None else args
        known = self.subcommands()
        if isinstance(given, list) and given and given[0] in known:  # the parser of each takes a while to build
            self.subcommands = lambda: {given[0]: known[given[0]]}  # type: ignore[method-assign]
        super().__init__(args=args, run=run, **{**defaults, **kwargs})

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommands, and the arguments of the trainer's methods that the CLI fills in."""
        return {name: {"model", "datamodule"} for name in TRAINERS}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``trainer``, ``algorithm``, ``perturbation``, ``model`` and ``data``."""
        skip: set[str | int] = {"algorithm", "perturbation", "seed"}
        parser.add_class_arguments(self.trainer_class, "trainer", instantiate=False, sub_configs=True, skip=skip)
        parser.set_defaults({f"trainer.{k}": v for k, v in self.trainer_defaults.items() if k != "callbacks"})
        parser.add_subclass_arguments(Algorithm, "algorithm", required=False)
        parser.add_subclass_arguments(Perturbation, "perturbation", required=False)
        parser.set_defaults({"algorithm": {"class_path": "fedlight.algorithms.fedavg.FedAvg"}})
        parser.add_lightning_class_args(self._model_class, "model", subclass_mode=self.subclass_mode_model)
        parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=self.subclass_mode_data)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, without a warning that shows the command line of the process, which may hold secrets of others."""
        self.config = parser.parse_object(args) if isinstance(args, dict | Namespace) else parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Refuse what is null and cannot be; let a command take the best weights there are, where none are named."""
        config = self.config.get(self.subcommand or "fit", {})
        keys = {"trainer": self.trainer_class, **dict.fromkeys(("model", "data", "algorithm", "perturbation"))}
        if wrong := [name for key, cls in keys.items() for name in nulls(config.get(key), key, cls)]:
            raise MisconfigurationException(f"{', '.join(wrong)} is null: give a value, or leave the key out.")
        files = [Path(str(file)) for file in config.get("config") or []]
        for key in ("callbacks", "transforms"):
            if lost := replaced(files, key, config.get(f"trainer.{key}")):
                rank_zero_info(
                    f"trainer.{key}: a later list took the place of one with {', '.join(lost)}; `{key}+` adds to it."
                )
        if self.subcommand not in (None, "fit") and config.get("ckpt_path") is None and not config.trainer.fast_dev_run:
            root = Path(config.trainer.default_root_dir).expanduser()
            config.ckpt_path = usual_checkpoint(files, root, config.trainer.name)

    def _parse_ckpt_path(self) -> None:
        """The model comes from the configuration; a checkpoint of another model is refused by the trainer."""

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if seed is None or (seed is not False and not 0 <= int(seed) < 2**32):
            raise MisconfigurationException(f"seed_everything={seed} must be at least 0 and below 2**32.")
        if seed is False:
            rank_zero_info(
                "seed_everything=False: initial weights differ from run to run; all other draws have seed 0."
            )
        super()._set_seed()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Build the trainer with the algorithm, the perturbation and the seed."""
        parts = {key: self._get(self.config_init, key) for key in ("algorithm", "perturbation")}
        seed = self._get(self.config, "seed_everything")
        return super().instantiate_trainer(**parts, seed=0 if seed is False else int(seed), **kwargs)


def replaced(files: Sequence[Path], key: str, now: Any) -> list[str]:
    """The classes that configurations name in a list of the trainer's, and that are not in the one that is used."""
    settings = [(get_loader("yaml")(file.read_text()) or {}).get("trainer") or {} for file in files]
    given = [item for found in settings for item in tree_leaves(found.get(key), lambda c: "class_path" in (c or ()))]
    names = [item["class_path"].rpartition(".")[2] for item in given if isinstance(item, dict)]
    used = {item.class_path.rpartition(".")[2] for item in (now if isinstance(now, list) else [now]) if item}
    return [name for name in names if used and name not in used]


def yaml_argument(argument: str) -> str:
    """``--key=value`` with a value that YAML reads, where Python's ``None`` stands in it.

    Sweep agents write values with Python's ``str``. YAML reads numbers, booleans, lists and dictionaries the same way,
    but ``None`` as a word.
    """
    key, equals, value = argument.partition("=")
    if not equals or not key.startswith("-") or "None" not in value:
        return argument
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return argument  # a string, such as a path
    return argument if isinstance(parsed, str | bytes) else f"{key}={json.dumps(parsed)}"


def parsers() -> dict[str, Any]:
    """The parsers of all commands that take a configuration."""
    found: dict[str, Any] = {}

    class Parsers(FederatedCLI):
        def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
            found.update(self._subcommand_parsers)
            raise StopIteration

    with suppress(StopIteration):
        Parsers([])
    return found


def main(args: ArgsType = None) -> None:
    """The console script. Exit codes: 2 for bad input, 1 for any other failure, 130 for Ctrl-C, 143 for SIGTERM.

    A run that a sweep agent stops with SIGTERM ends by that signal, as agents take any exit code for a failure.
    """
    given = sys.argv[1:] if args is None else args
    try:
        if isinstance(given, list) and given and given[0] in COMMANDS:
            sys.exit(importlib.import_module(COMMANDS[given[0]]).main(given[1:]))
        if isinstance(given, list) and given[:1] == ["--print_completion"]:
            print(completion(given[1:], parsers()))
            return
        FederatedCLI(args, parser_kwargs={"prog": "fedlight"})
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as stop:
        if stop.code == 128 + signal.SIGTERM and "WANDB_SWEEP_ID" in os.environ:
            exit_by_signal(signal.SIGTERM)
        raise
    except (
        MisconfigurationException,
        ValueError,
        TypeError,
        FloatingPointError,
        ConnectionError,
        PermissionError,
    ) as error:
        found = _ours(error)
        if found is None:
            raise
        sys.exit(_fail(found))


def _ours(error: BaseException | None) -> BaseException | None:
    """What fedlight raised on purpose, so that its message says all: the error, or one that another was made of."""
    while error is not None:
        if (
            isinstance(error, MisconfigurationException | PermissionError)
            or raised_in(error).split(".")[0] == fedlight.__name__
        ):
            return error
        if str(error).startswith("Does not validate against any of the Union"):  # it has swallowed the error inside
            return ValueError(readable(str(error)).strip())
        error = error.__cause__ or error.__context__
    return None


def _fail(error: BaseException) -> int:
    print("\n".join([f"fedlight: error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
    return 1 if isinstance(error, FloatingPointError | ConnectionError) else 2

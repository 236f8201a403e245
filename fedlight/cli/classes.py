"""The classes that are known by short names: listed, folded in the help, and completed by a shell."""

import argparse
import inspect
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import DefaultHelpFormatter, Namespace, _typehints
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fedlight.algorithms.base import Algorithm
from fedlight.cli.configs import configs, part_names
from fedlight.data.datamodule import FederatedDataModule
from fedlight.data.partition import Partitioner
from fedlight.personal.base import Personalization
from fedlight.perturbations.base import Perturbation
from fedlight.server.aggregators import Aggregator
from fedlight.server.sampling import Sampler
from fedlight.transforms.base import Transform

_BASES: dict[str, type] = {
    **{"algorithm": Algorithm, "perturbation": Perturbation, "data": FederatedDataModule, "model": LightningModule},
    **{"trainer.callbacks+": Callback, "trainer.sampler": Sampler, "data.partitioner": Partitioner},
    **{"model.optimizer": Optimizer, "model.lr_scheduler": LRScheduler, "trainer.logger": Logger},
    **{"trainer.transforms+": Transform, "trainer.aggregator": Aggregator, "trainer.personal": Personalization},
}
_SHOWN = 8
_NULL = re.compile(r"None|Optional|empty|^typing\.Any")
_METHODS = (Algorithm, Perturbation, Personalization, Aggregator, Transform)
_classes: Any = _typehints  # of jsonargparse, which has no public place to say this
_keep_settings = _classes.discard_init_args_on_class_path_change
_all_classes = _classes.get_all_subclass_paths


def _begin_anew(parser: Any, before: Any, now: Any) -> None:
    """A method in the place of another has its own defaults: jsonargparse keeps settings of the same names.

    FedAdam would have FedAvg's ``server_lr`` of 1, and ASAM the radius of SAM. Of optimizers and models they are kept.
    """
    if before and "init_args" in before and before["class_path"] != now["class_path"]:
        one, other = map(_classes.import_object, (before["class_path"], now["class_path"]))
        if one is not other and inspect.isclass(other) and issubclass(other, _METHODS):
            vars(before["init_args"]).clear()
    _keep_settings(parser, before, now)


def _with_ours(*args: Any, **kwargs: Any) -> list[str]:
    """The classes that may be named, without those of torchvision and Lightning that are called as fedlight's."""
    paths = _all_classes(*args, **kwargs)
    ours = {path.rpartition(".")[2] for path in paths if path.startswith("fedlight.")}
    return [p for p in paths if p.rpartition(".")[2] not in ours or not p.startswith(("torchvision.", "lightning."))]


_classes.discard_init_args_on_class_path_change = _begin_anew
_classes.get_all_subclass_paths = _with_ours


def class_names() -> dict[str, str]:
    """The classes that are known by short names, and the key that each belongs under."""
    return {c.__name__: key for key, base in _BASES.items() for c in _known(base)}


def taking(key: str, setting: str) -> list[str]:
    """The classes under a key that have this setting."""
    found = [c for k, base in _BASES.items() if k.removesuffix("+") == key for c in _known(base)]
    return sorted(c.__name__ for c in found if setting in inspect.signature(c).parameters)


def nulls(config: Any, key: str, cls: Any = None) -> list[str]:
    """The settings of fedlight's classes that are null and cannot be, as where a value was commented out."""
    if isinstance(config, list):
        return [name for item in config for name in nulls(item, key)]
    given = vars(config) if isinstance(config, Namespace) else {}
    if "class_path" in given:
        return nulls(given.get("init_args"), key, _classes.import_object(given["class_path"]))
    takes = inspect.signature(cls).parameters if getattr(cls, "__module__", "").startswith("fedlight.") else {}
    wrong = [n for n, p in takes.items() if given.get(n, p) is None and not _NULL.search(f"{p.annotation}{p.default}")]
    return [f"{key}.{n}" for n in wrong] + [name for n, value in given.items() for name in nulls(value, f"{key}.{n}")]


def list_classes(args: Sequence[str]) -> str | None:
    """What there is for the key of ``--<key>.help`` without a class, a line each; None for any other command line."""
    bases = {f"--{key.removesuffix('+')}.help": base for key, base in _BASES.items()}
    asked = [a for a, after in zip(args, [*args[1:], "-"], strict=True) if a in bases and after.startswith("-")]
    if not asked:
        return None
    found = [c for c in _known(bases[asked[0]]) if not (inspect.isabstract(c) or c is bases[asked[0]])]
    found.sort(key=lambda c: (c.__module__.split(".")[0] != "fedlight", c.__name__))
    width, columns = max(len(c.__name__) for c in found), shutil.get_terminal_size((100, 24)).columns
    lines = [f"{c.__name__:<{width}}  {_first_line(c)}"[:columns] for c in found]
    return "\n".join([*lines, "", f"The arguments of one: {asked[0]} {found[0].__name__}"])


def _first_line(cls: type) -> str:
    return re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"\1", (inspect.getdoc(cls) or "").partition("\n")[0])


class ShortHelp(DefaultHelpFormatter):
    """Names the classes of fedlight, and says how many others there are."""

    def _expand_help(self, action: argparse.Action) -> str:
        return re.sub(r"known subclasses: ([\w., ]+)", _folded, super()._expand_help(action))


def _folded(known: re.Match[str]) -> str:
    names = known[1].split(", ")
    own = [name for name in names if name.startswith("fedlight.")]
    others = f"{len(names) - len(own)} of torch, Lightning and others"
    return known[0] if len(names) <= _SHOWN else f"known subclasses: {', '.join(own)}{' and ' * bool(own)}{others}"


def _known(base: type) -> list[type]:
    """A class and all that inherit from it, without private ones."""
    children: list[type] = base.__subclasses__()
    found = {c for child in children for c in (child, *_known(child))} | {base}
    return [c for c in found if not c.__name__.startswith("_")]


def completion(args: Sequence[str], parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """The script of ``fedlight --print_completion SHELL``: it completes commands, keys, classes, configurations."""
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

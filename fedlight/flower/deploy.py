"""``fedlight deploy``: what ``fedlight fit`` takes becomes an app, which Flower runs between sites."""

import argparse
import importlib
import json
import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight import __version__
from fedlight.cli.command import FederatedCLI, SaveConfig
from fedlight.trainer import FederatedTrainer

PACKAGE = "fedlight_app"
"""The folder of the app that is imported: the configuration lies in it, so that it travels with the code."""
FLOWER = "flwr>=1.42,<1.43"
_LEFT_OUT = {"build", "eggs", "lib", "lib64", "parts", "env", "venv", "ENV"}

_MODULE = '''"""The {side} of the experiment in config.yaml."""

from fedlight.flower import {side}_app

app = {side}_app(__file__)
'''
_PYPROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = {name}
version = "1.0.0"
description = {description}
license = {{ file = "LICENSE" }}
dependencies = [{fedlight}, "{flower}"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = {publisher}
fab-format-version = 1
flwr-version-target = "1.42.0"

[tool.flwr.app.components]
serverapp = "{package}.server_app:app"
clientapp = "{package}.client_app:app"

# `flwr run -c 'rounds=100 min-results=3'` changes these, and every other setting is config.yaml's.
[tool.flwr.app.config]
rounds = {rounds}
seed = {seed}
min-results = 1      # a round that fewer sites answer is an error
timeout = 3600       # seconds that a round waits
folder = ""          # the server's trainer.default_root_dir, an absolute path; by default config.yaml's
resume = ""          # "last", or the path of a checkpoint at the server
data = "experiment"  # or "sites": every site has data of its own
"""
_NEXT = """{app}/ holds an app for Flower: {method}, {rounds} rounds. To run it between sites:

  # the server
  flower-superlink --insecure --host 0.0.0.0 --port 8000 --disable-runtime-dependency-installation

  # each site: the clients that live there, and the folder for what they keep
  flower-supernode --insecure --superlink SERVER:8000 \\
      --node-config 'partition-ids="0 1" state="/var/lib/fedlight"{allow}'

  # from here, with this in ~/.flwr/config.toml:  [superlink.mine]  address = "SERVER:8000"  insecure = true
  flwr run {quoted} mine --stream

The page on deployment has TLS, authentication, and what each side sees of the other."""


class Composed(FederatedCLI):
    """Reads and builds what ``fit`` takes, and trains nothing.

    Attributes:
        text: the complete configuration, as a run's folder has it.
    """

    text: str
    trainer: FederatedTrainer  # type: ignore[assignment]

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse without Lightning's warning that there are arguments on the command line as well."""
        self.config = parser.parse_args(args)

    def fit(self, **parts: Any) -> None:
        """Keep the configuration; a checkpoint belongs to a run of the app."""
        config = self.config["fit"]
        if config.ckpt_path is not None:
            raise MisconfigurationException("ckpt_path: an app is resumed by `flwr run APP -c 'resume=\"last\"'`.")
        self.text = SaveConfig(self._parser("fit"), config).text(self.trainer, continued=True)


def main(args: Sequence[str]) -> int:
    """Write the app."""
    parser = _parser()
    if args[:1] != ["flower"]:
        if args and args[0] not in ("-h", "--help"):
            parser.error(f"there is fedlight deploy flower, and no {args[0]!r}")
        parser.print_help()
        return 0 if args else 2
    options, rest = parser.parse_known_args(args[1:])
    app: Path = options.output
    if app.exists() and not (app.is_dir() and not any(app.iterdir())):
        parser.error(f"-o {app} is there already: name a folder that is new or empty")
    if not rest:
        parser.error("it needs a configuration. To begin with: fedlight deploy flower -c quickstart -o app")
    composed = Composed(["fit", *rest])
    write(app, composed, options.publisher)
    allow = sorted(imported(yaml.safe_load(composed.text)))
    said = {"app": app, "quoted": shlex.quote(str(app)), "allow": f' allow="{" ".join(allow)}"' * bool(allow)}
    print(_NEXT.format(**said, method=composed.trainer.method_name, rounds=composed.trainer.max_rounds))
    return 0


def write(app: Path, composed: Composed, publisher: str) -> None:
    """Write a Flower app.

    Args:
        app: its folder, which must not exist.
        composed: the experiment.
        publisher: who Flower is told made it.

    Raises:
        MisconfigurationException: where the experiment cannot be deployed.
    """
    with suppress(ModuleNotFoundError):
        importlib.import_module("fedlight.flower.server").check_deployable(composed.trainer, composed.datamodule)
    code = own_code(yaml.safe_load(composed.text))
    name = re.sub(r"[^a-zA-Z0-9]+", "-", app.absolute().name).lstrip("-")
    values = {
        "name": (name if name[:1].isalpha() else f"app-{name}")[:32].strip("-"),
        "description": f"{composed.trainer.method_name}, with fedlight",
        "fedlight": f"fedlight[flower]=={__version__}",
        "publisher": publisher,
        "rounds": composed.trainer.max_rounds,
        "seed": composed.trainer.seed,
    }
    quoted = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
    (app / PACKAGE).mkdir(parents=True)
    files = {f"{side}_app.py": _MODULE.format(side=side) for side in ("client", "server")}
    for file, text in {**files, "__init__.py": "", "config.yaml": composed.text}.items():
        (app / PACKAGE / file).write_text(text, encoding="utf-8")
    for source, goal in code:
        (app / goal).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, app / goal)
    (app / "LICENSE").write_text("")
    (app / "pyproject.toml").write_text(_PYPROJECT.format(**quoted, flower=FLOWER, package=PACKAGE), encoding="utf-8")


def imported(config: Any) -> set[str]:
    """The packages that a configuration names classes or functions of, besides fedlight, Lightning and torch."""
    if isinstance(config, dict | list):
        values = config.values() if isinstance(config, dict) else config
        return {name for value in values for name in imported(value)}
    path = config if isinstance(config, str) and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", config) else ""
    return {path.partition(".")[0]} & sys.modules.keys() - {"fedlight", "lightning", "torch"}


def own_code(config: Any) -> list[tuple[Path, Path]]:
    """The files of modules that are not installed but lie in a folder, so that they have to travel with the app.

    Args:
        config: the configuration that names them; what was imported from the same folder by then belongs to it.

    Returns:
        Each file, and where it goes in the app.

    Raises:
        MisconfigurationException: for a module that Flower would leave out of the app.
    """
    tops = {name: place for name, module in list(sys.modules.items()) if "." not in name and (place := _place(module))}
    folders = {tops[name].parent for name in imported(config) & tops.keys()}
    found = {name: place for name, place in tops.items() if place.parent in folders} if folders else {}
    found = {name: place for name, place in found.items() if name not in ("fedlight", "__main__")}
    loaded = {Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    code = []
    for name, place in sorted(found.items()):
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            if not re.fullmatch(r"test_.*|.*_test", file.stem) and name not in _LEFT_OUT:
                code.append((file, file.relative_to(place.parent)))
            elif file in loaded:
                raise MisconfigurationException(f"{file} would not travel: Flower leaves out such names. Rename it.")
    return code


def _place(module: ModuleType | None) -> Path | None:
    """The folder of a package or the file of a module; None where it is installed, or built in."""
    path = next(iter(getattr(module, "__path__", None) or [getattr(module, "__file__", None)]), None)
    installed = {"site-packages", "dist-packages"} & {*Path(path or "").parts}
    inside = path and not installed and not Path(path).is_relative_to(sysconfig.get_path("stdlib"))
    return Path(path).absolute() if path and inside else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fedlight deploy flower",
        description="Write an app that runs an experiment between sites, on Flower's SuperLink and SuperNodes.",
        epilog="All else is as for `fedlight fit`: -c quickstart --trainer.max_rounds 3 --algorithm FedDyn ...",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, metavar="APP", help="the folder to write, new or empty")
    add("--publisher", default="local", metavar="NAME", help="who Flower is told has made the app (default: local)")
    return parser

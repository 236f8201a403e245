"""``fedlight deploy``: what ``fedlight fit`` takes becomes an app, which Flower runs between sites."""

import argparse
import json
import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight import __version__
from fedlight.cli.command import SaveConfig
from fedlight.data.federated import training_data
from fedlight.flower.config import ALLOWED, Parts, import_paths
from fedlight.flower.local import run_local
from fedlight.flower.server import check_deployable
from fedlight.run.folder import place
from fedlight.studies.command import positive

PACKAGE = "fedlight_app"
"""The folder of the app that is imported: the configuration lies in it, so that it travels with the code."""
FLOWER = "flwr>=1.42,<1.43"
_LEFT_OUT = {"build", "eggs", "lib", "lib64", "parts", "env", "venv", "ENV"}

_MODULE = '''"""The {side} of the experiment in config.yaml."""

from fedlight.flower import {side}_app

app = {side}_app(__file__)
'''
_PYPROJECT = """[project]
name = {name}
version = "1.0.0"
description = {description}
license = {{ file = "LICENSE" }}
dependencies = [{fedlight}, "{flower}"]

[tool.flwr.app]
publisher = {publisher}
fab-format-version = 1
flwr-version-target = "1.42.0"

[tool.flwr.app.components]
serverapp = "{package}.server_app:app"
clientapp = "{package}.client_app:app"

# `flwr run -c 'rounds=100 min-results=3'` changes these; every other setting is config.yaml's.
[tool.flwr.app.config]
rounds = {rounds}
seed = {seed}
min-results = 1      # a round that fewer clients answer is an error
timeout = 3600       # seconds that a round waits
folder = ""          # the server's trainer.default_root_dir, an absolute path; by default config.yaml's
resume = ""          # "last", or the path of a checkpoint at the server
wait = 600           # seconds that the run waits for its sites to come
data = "experiment"  # or "sites": every site has data of its own, and there are so many
clients = 0
spectrum = "server"  # or "sites": Hessians are over the data of all sites; always so with data = "sites"
"""
_NEXT = """{app}/ is an app for Flower: {method}, {rounds} rounds. On the server, at each site, and where you are:

  flower-superlink --insecure --host 0.0.0.0 --disable-runtime-dependency-installation
  flower-supernode --insecure --superlink SERVER:8000 \\
      --node-config 'partition-ids="0 1" state="/var/lib/fedlight"{allow}'
  flwr run {quoted} mine --stream

with `[superlink.mine]`, `address = "SERVER:8000"` and `insecure = true` in ~/.flwr/config.toml. docs/deployment.md has
TLS, authentication, and what each side sees of the other. All of it on this machine:

  fedlight deploy flower -o {quoted} --local 3"""


def _text(composed: Parts) -> str:
    """The complete configuration, as a run's folder has it; a checkpoint belongs to a run of the app."""
    config = composed.config["fit"]
    if config.ckpt_path is not None:
        raise MisconfigurationException("ckpt_path: an app is resumed by `flwr run APP -c 'resume=\"last\"'`.")
    return SaveConfig(composed._parser("fit"), config).text(composed.trainer, continued=True)


def main(args: Sequence[str]) -> int:
    """Write the app, or run it where ``--local`` asks for that; the exit code of a run that fails is 1."""
    parser = _parser()
    if args[:1] not in (["flower"], ["-h"], ["--help"]):
        parser.error(f"there is `fedlight deploy flower`, and no {' '.join(args[:1])!r}")
    options, rest = parser.parse_known_args(args[1:] if args[0] == "flower" else args)
    if options.local and find_spec("flwr") is None:
        raise MisconfigurationException('--local needs Flower: pip install "fedlight[flower]"')
    app: Path = options.output
    config = app / PACKAGE / "config.yaml"
    if options.local and not rest and config.is_file():
        sys.path.insert(0, str(app.absolute()))  # its code, which travels with it
        composed = Parts(["fit", "-c", str(config)])
    elif app.exists() and not (app.is_dir() and not any(app.iterdir())):
        parser.error(f"-o {app} is there already: name a folder that is new or empty")
    elif not rest:
        parser.error("it needs a configuration. To begin with: fedlight deploy flower -c quickstart -o app")
    else:
        composed = Parts(["fit", *rest])
        _write(app, composed, options.publisher)
    allow = " ".join(sorted(_imported(yaml.safe_load(_text(composed)))))
    if options.local:
        data = training_data(composed.datamodule, centralized=False)
        data.prepare_data()
        data.setup("fit")
        return run_local(app, options.local, data.num_clients, allow)
    said = {"app": app, "quoted": shlex.quote(str(app)), "allow": f' allow="{allow}"' * bool(allow)}
    print(_NEXT.format(**said, method=composed.trainer.method_name, rounds=composed.trainer.max_rounds))
    return 0


def _write(app: Path, composed: Parts, publisher: str) -> None:
    """Write the app; nothing is written where the experiment cannot be deployed."""
    check_deployable(composed.trainer, composed.datamodule, composed.model)
    text = _text(composed)
    code = _own_code(yaml.safe_load(text))
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
    for file, content in {**files, "__init__.py": "", "config.yaml": text}.items():
        (app / PACKAGE / file).write_text(content, encoding="utf-8")
    for source, goal in code:
        (app / goal).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, app / goal)
    (app / "LICENSE").write_text("")
    (app / "pyproject.toml").write_text(_PYPROJECT.format(**quoted, flower=FLOWER, package=PACKAGE), encoding="utf-8")


def _imported(config: Any) -> set[str]:
    """The packages that a configuration names classes or functions of, besides what every site allows."""
    return {path.partition(".")[0] for path in import_paths(config)} & sys.modules.keys() - {*ALLOWED}


def _own_code(config: Any) -> list[tuple[Path, Path]]:
    """The files that have to travel, as they are not installed but lie in a folder, and where they go in the app.

    These are the modules that the configuration names, and what was imported from the same folder by now.
    """
    tops = {name: place for name, module in list(sys.modules.items()) if "." not in name and (place := _place(module))}
    folders = {tops[name].parent for name in _imported(config) & tops.keys()}
    loaded = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    code = []
    for name in sorted(tops.keys() - {"fedlight", "__main__"}):
        place, packed = tops[name], name not in _LEFT_OUT
        for file in sorted(place.rglob("*.py") if place.is_dir() else [place]) * (place.parent in folders):
            if packed and not re.fullmatch(r"test_.*|.*_test", file.stem):
                code.append((file, file.relative_to(place.parent)))
            elif str(file) in loaded:
                raise MisconfigurationException(f"{file} would not travel: Flower leaves out such names. Rename it.")
    return code


def _place(module: ModuleType | None) -> Path | None:
    """The folder of a package or the file of a module; None where it is installed, or built in."""
    found = next(iter(getattr(module, "__path__", None) or [getattr(module, "__file__", None)]), None)
    path = Path(found or sysconfig.get_path("stdlib")).absolute()
    installed = {"site-packages", "dist-packages"} & {*path.parts}
    return None if installed or path.is_relative_to(sysconfig.get_path("stdlib")) else path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fedlight deploy flower",
        description="Write an app that runs an experiment between sites, on Flower's SuperLink and SuperNodes.",
        epilog="All else is as for `fedlight fit`: -c quickstart --trainer.max_rounds 3 --algorithm FedDyn ...",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-o", "--output", type=place, required=True, metavar="APP", help="the folder to write, new or empty")
    add("--local", type=positive, metavar="N", help="run the app on this machine, with N nodes that share the clients; "
        "without a configuration, one that was written before")  # fmt: skip
    add("--publisher", default="local", metavar="NAME", help="who Flower is told has made the app (default: local)")
    return parser

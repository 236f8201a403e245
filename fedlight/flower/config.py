"""An app where it is run: its configuration, read, checked and changed as options say; what either side has of data."""

import re
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import Dataset, Subset

from fedlight.cli.command import FederatedCLI
from fedlight.data.datamodule import FederatedDataModule
from fedlight.data.federated import Wrapping
from fedlight.trainer import FederatedTrainer

ALLOWED = ("fedlight", "torch", "torchvision", "torchmetrics", "lightning")
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_QUIET = {"logger": False, "enable_progress_bar": False, "enable_plots": False, "enable_checkpointing": False}


def check_allowed(config: Any, allowed: str = "") -> None:
    """Refuse a configuration that names classes or functions outside the packages that a site allows.

    A class path is code: it is imported and called with what the configuration gives it. ``allowed`` are import paths
    besides fedlight's, torch's and Lightning's.
    """
    known = (*ALLOWED, *allowed.split())
    paths = {path for path in import_paths(config) if not any(path == k or path.startswith(f"{k}.") for k in known)}
    if paths:
        raise MisconfigurationException(
            f"config.yaml names {', '.join(sorted(paths))}, and this site allows {', '.join(known)} alone. If it is"
            " yours to trust, start the node with `allow` in its node-config."
        )


def import_paths(value: Any, key: str = "") -> Iterator[str]:
    """What a configuration names of classes and functions, by their import paths."""
    if isinstance(value, Mapping):
        for name, inside in value.items():
            yield from import_paths(inside, str(name))
    elif isinstance(value, list):
        for inside in value:
            yield from import_paths(inside, key)
    elif isinstance(value, str) and _PATH.fullmatch(value):
        top = value.partition(".")[0]  # others than could be imported are names of layers or files
        if key == "class_path" or top in sys.modules or find_spec(top) is not None:
            yield value


class Parts(FederatedCLI):
    """Trainer, module and data of a configuration, which nothing is done with yet."""

    trainer: FederatedTrainer  # type: ignore[assignment]

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


def build(config: Path, trainer_class: type[FederatedTrainer], options: Mapping[str, Any], site: bool) -> Parts:
    """Read an app's configuration as the options of run and node say; a site writes nothing and shows nothing."""
    given: dict[str, Any] = {"trainer.devices": 1, "trainer.num_nodes": 1, "trainer.strategy": "auto"}
    if site:
        given |= {f"trainer.{key}": value for key, value in _QUIET.items()}
    if options.get("rounds"):
        given["trainer.max_rounds"] = options["rounds"]
    if int(options.get("seed", -1)) >= 0:
        given["seed_everything"] = options["seed"]
    if options.get("folder") and not site:
        given["trainer.default_root_dir"] = options["folder"]
    arguments = ["fit", "-c", str(config)]
    if site and options.get("source"):
        given |= {"data.init_args.source": options["source"], "data.init_args.num_clients": 1}
    elif site and options.get("own-data"):
        arguments.append(f"--data={options['own-data']}")
    arguments += [f"--{key}={value}" for key, value in given.items()]
    return Parts(arguments, trainer_class=trainer_class)


_NOTHING: Dataset[Any] = Subset([], [])  # type: ignore[arg-type]


class RemoteData(FederatedDataModule):
    """What the server knows of data that are at the sites: n_i of every client, and the size of a batch."""

    def __init__(self, sizes: list[int], batch_size: int) -> None:
        super().__init__(batch_size)
        self.num_clients, self.sizes = len(sizes), sizes

    def client_dataset(self, client: int) -> Dataset[Any]:
        """Nothing: it is elsewhere."""
        return _NOTHING

    def client_size(self, client: int) -> int:
        """n_i."""
        return self.sizes[client]


class OwnData(Wrapping):
    """A site's own data, as those of one ``client`` among others, of whom the site has nothing."""

    def __init__(self, data: FederatedDataModule, client: int, num_clients: int) -> None:
        super().__init__(data)
        self._client, self.num_clients = client, num_clients

    def setup(self, stage: str | None = None) -> None:
        """Load the site's data, which must be those of one client."""
        super().setup(stage)
        if self.data.num_clients != 1:
            raise ValueError(f"`data` of a site must have one client, and has {self.data.num_clients}.")

    def client_dataset(self, client: int) -> Dataset[Any]:
        """The site's training data; nothing for other clients."""
        return self.data.client_dataset(0) if client == self._client else _NOTHING

    def client_size(self, client: int) -> int:
        """n_i; 0 for other clients."""
        return self.data.client_size(0) if client == self._client else 0

    def client_val_dataset(self, client: int) -> Dataset[Any] | None:
        """The site's held-out data."""
        if client != self._client:
            return None
        return self.data.client_val_dataset(0) or self.data.val_dataset()

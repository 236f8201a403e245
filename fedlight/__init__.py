"""fedlight: federated learning experiments on PyTorch Lightning and Fabric."""

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlight import algorithms as algorithms
    from fedlight import callbacks as callbacks
    from fedlight import data as data
    from fedlight import engines as engines
    from fedlight import models as models
    from fedlight import penalties as penalties
    from fedlight import personal as personal
    from fedlight import perturbations as perturbations
    from fedlight import transforms as transforms
    from fedlight.algorithms.base import Algorithm as Algorithm
    from fedlight.algorithms.fedavg import FedAvg as FedAvg
    from fedlight.algorithms.fedprox import FedProx as FedProx
    from fedlight.callbacks.checkpoint import Checkpoint as Checkpoint
    from fedlight.callbacks.hessian import HessianSpectrum as HessianSpectrum
    from fedlight.callbacks.landscape import LossLandscape as LossLandscape
    from fedlight.callbacks.progress import RoundProgress as RoundProgress
    from fedlight.data import DatasetPartition as DatasetPartition
    from fedlight.data import FederatedDataModule as FederatedDataModule
    from fedlight.data import ImageData as ImageData
    from fedlight.local import ClientResult as ClientResult
    from fedlight.local import LocalObjective as LocalObjective
    from fedlight.models import Classifier as Classifier
    from fedlight.penalties.base import Penalty as Penalty
    from fedlight.penalties.man import MAN as MAN
    from fedlight.perturbations.base import Perturbation as Perturbation
    from fedlight.server import sampling as sampling
    from fedlight.trainer import FederatedTrainer as FederatedTrainer

__version__ = "0.1.0"

# Loaded when they are asked for: `from fedlight import MAN` loads what MAN needs, and nothing of the trainer.
_WHERE = {
    # the trainer
    "FederatedTrainer": "trainer",
    # flatness
    "HessianSpectrum": "callbacks.hessian",
    "LossLandscape": "callbacks.landscape",
    "MAN": "penalties.man",
    "Penalty": "penalties.base",
    "Perturbation": "perturbations.base",
    # algorithms
    "Algorithm": "algorithms.base",
    "ClientResult": "local",
    "FedAvg": "algorithms.fedavg",
    "FedProx": "algorithms.fedprox",
    "LocalObjective": "local",
    # data and models
    "Classifier": "models",
    "DatasetPartition": "data",
    "FederatedDataModule": "data",
    "ImageData": "data",
    # other callbacks
    "Checkpoint": "callbacks.checkpoint",
    "RoundProgress": "callbacks.progress",
}
__all__ = [*_WHERE, "algorithms", "callbacks", "data", "engines", "models"]
__all__ += ["penalties", "personal", "perturbations", "sampling", "transforms"]

# Where modules of 0.1 are: their old paths go on working in YAML files, programs and the settings of checkpoints.
MOVED = {
    "analysis.diagnosis": "analysis.layers",
    "analysis.layer_pictures": "analysis.pictures",
    "callbacks.curves": "callbacks.pictures",
    "callbacks.man": "penalties.man",
    "callbacks.partition": "callbacks.pictures",
    "callbacks.penalty": "penalties.base",
    "checkpoint": "run.checkpoint",
    "clients": "server.clients",
    "data.loaders": "data.reading",
    "data.pooled": "data.federated",
    "data.splits": "data.folders",
    "evaluation": "run.evaluation",
    "federation": "server.federation",
    "loggers": "run.loggers",
    "optimizers": "module.optimizers",
    "parameters": "module.parameters",
    "report.document": "report.writers",
    "run_folder": "run.folder",
    "sampling": "server.sampling",
    "studies.keys": "studies.study",
}


class _Moved(MetaPathFinder, Loader):
    """Finds a module of 0.1 under its old path: the same object as under its new one."""

    def find_spec(self, fullname: str, *args: object) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == __name__ and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"{__name__}.{MOVED[spec.name.partition('.')[2]]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state if module.__spec__ else None


sys.meta_path.append(_Moved())


@contextmanager
def loading() -> Iterator[None]:
    """For imports: nothing of what is loaded is garbage, and looking for some takes time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with loading():
        module = importlib.import_module(f"{__name__}.{_WHERE.get(name) or MOVED.get(name, name)}")
    globals()[name] = value = getattr(module, name) if name in _WHERE else module
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

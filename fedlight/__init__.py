"""fedlight: federated learning experiments on PyTorch Lightning and Fabric."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlight import algorithms, callbacks, data, engines, models, perturbations, sampling
    from fedlight.algorithms.base import Algorithm
    from fedlight.algorithms.fedavg import FedAvg
    from fedlight.algorithms.fedprox import FedProx
    from fedlight.callbacks.checkpoint import Checkpoint
    from fedlight.callbacks.hessian import HessianSpectrum
    from fedlight.callbacks.landscape import LossLandscape
    from fedlight.callbacks.man import MAN
    from fedlight.callbacks.penalty import Penalty
    from fedlight.callbacks.progress import RoundProgress
    from fedlight.data import DatasetPartition, FederatedDataModule, ImageData
    from fedlight.local import ClientResult, LocalObjective
    from fedlight.models import Classifier
    from fedlight.perturbations.base import Perturbation
    from fedlight.trainer import FederatedTrainer

__version__ = "0.1.0"

__all__ = [
    # the trainer
    "FederatedTrainer",
    # flatness
    "HessianSpectrum",
    "LossLandscape",
    "MAN",
    "Penalty",
    "Perturbation",
    # algorithms
    "Algorithm",
    "ClientResult",
    "FedAvg",
    "FedProx",
    "LocalObjective",
    # data and models
    "Classifier",
    "DatasetPartition",
    "FederatedDataModule",
    "ImageData",
    # other callbacks
    "Checkpoint",
    "RoundProgress",
    # packages
    "algorithms",
    "callbacks",
    "data",
    "engines",
    "models",
    "perturbations",
    "sampling",
]

# Loaded when they are asked for: `from fedlight import MAN` loads what MAN needs, and nothing of the trainer.
_WHERE = {
    "Algorithm": "algorithms.base",
    "Checkpoint": "callbacks.checkpoint",
    "Classifier": "models",
    "ClientResult": "local",
    "DatasetPartition": "data",
    "FedAvg": "algorithms.fedavg",
    "FedProx": "algorithms.fedprox",
    "FederatedDataModule": "data",
    "FederatedTrainer": "trainer",
    "HessianSpectrum": "callbacks.hessian",
    "ImageData": "data",
    "LocalObjective": "local",
    "LossLandscape": "callbacks.landscape",
    "MAN": "callbacks.man",
    "Penalty": "callbacks.penalty",
    "Perturbation": "perturbations.base",
    "RoundProgress": "callbacks.progress",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    elif name in __all__:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

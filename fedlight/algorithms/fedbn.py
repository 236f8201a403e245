"""FedBN."""

from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch import LightningModule
from torch.nn.modules.batchnorm import _BatchNorm

from fedlight.algorithms.base import Number
from fedlight.algorithms.fedavg import FedAvg
from fedlight.module.parameters import ParameterLayout
from fedlight.personal.base import Personalization
from fedlight.personal.parts import PersonalParts


class _BatchNorms(PersonalParts):
    """BatchNorm layers, if there are any."""

    def setup(self, module: LightningModule, layout: ParameterLayout) -> None:
        if any(isinstance(m, _BatchNorm) for m in module.modules()):
            return super().setup(module, layout)
        rank_zero_warn(
            "algorithm: FedBN keeps BatchNorm parameters local, and the model has none, so all are averaged as in"
            " FedAvg. Use a model with BatchNorm layers, or `algorithm: FedAvg`."
        )
        return Personalization.setup(self, module, layout)


class FedBN(FedAvg):
    """FedAvg whose clients keep their BatchNorm layers, parameters and running statistics, to themselves.

    It is short for ``trainer.personal: BatchNorm`` with ``trainer.buffers: local``, and warns where there is none.

    Args:
        server_lr: length of the server's step.

    Source: Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR 2021,
    algorithm 1.
    """

    buffers = "local"

    def __init__(self, server_lr: Number = 1.0) -> None:
        super().__init__(server_lr)
        self.personal = _BatchNorms("BatchNorm")

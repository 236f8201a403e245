"""What does not fit together is refused, with the key and the fix."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.algorithms import SCAFFOLD as Scaffold
from fedlight.algorithms import FedAvg, FedBN, FedCM, FedDC, FedDyn, FedOpt
from fedlight.perturbations import ASAM, SAM
from fedlight.trainer import FederatedTrainer
from tests.contracts.combinations import Clients, Listed, Logistic


class Sign(torch.optim.Optimizer):
    """An optimizer without a learning rate."""

    def __init__(self, params):
        super().__init__(params, {"size": 0.01})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["size"] * p.grad.sign())


class WithoutLearningRate(Logistic):
    def configure_optimizers(self):
        return Sign(self.parameters())


class WithZeroLearningRate(Logistic):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(tmp_path, algorithm, perturbation=None, model=None, ckpt_path=None, **settings):
    defaults = {
        "max_rounds": 1,
        "clients_per_round": 2,
        "sampler": Listed((0, 1), (1, 2)),
        "accelerator": "cpu",
        "devices": 1,
        "enable_progress_bar": False,
        "engine": "eager",
        "default_root_dir": tmp_path,
    }
    trainer = FederatedTrainer(algorithm=algorithm, perturbation=perturbation, **{**defaults, **settings})
    trainer.fit(model or Logistic(), Clients(), ckpt_path=ckpt_path)
    return trainer


def checkpoint(trainer):
    return trainer.run_dir / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("model", [WithoutLearningRate, WithZeroLearningRate])
@pytest.mark.parametrize("algorithm", [Scaffold, FedDC, FedCM])
def test_a_method_that_divides_by_the_learning_rate_needs_one(tmp_path, algorithm, model):
    with pytest.raises(MisconfigurationException, match=rf"algorithm: {algorithm.__name__} divides by the local lear"):
        fit(tmp_path, algorithm(), model=model())


def test_other_methods_need_none(tmp_path):
    fit(tmp_path, FedDyn(), model=WithoutLearningRate())


@pytest.mark.parametrize(
    ("algorithm", "perturbation", "message"),
    [
        (FedAvg(), None, "algorithm.class_path: FedDyn in the checkpoint, FedAvg here"),
        (FedDyn(), None, "perturbation: {'class_path': 'SAM', 'rho': 0.05} in the checkpoint, None here"),
        (FedDyn(), ASAM(), "perturbation.class_path: SAM in the checkpoint, ASAM here"),
    ],
)
def test_a_checkpoint_of_another_method_is_refused(tmp_path, algorithm, perturbation, message):
    first = fit(tmp_path, FedDyn(), SAM())
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, algorithm, perturbation, ckpt_path=checkpoint(first), max_rounds=2)


def test_a_checkpoint_whose_state_differs_is_refused(tmp_path):
    first = fit(tmp_path, FedOpt(torch.optim.Adam))
    with pytest.raises(MisconfigurationException, match="algorithm.optimizer: Adam in the checkpoint, "):
        fit(
            tmp_path,
            FedOpt(lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.9)),
            ckpt_path=checkpoint(first),
            max_rounds=2,
        )


def test_fedbn_without_batch_norm_warns(tmp_path):
    with pytest.warns(UserWarning, match="FedBN keeps BatchNorm"):
        fit(tmp_path, FedBN())


def test_a_radius_of_zero_trains_as_without_a_perturbation(tmp_path):
    one, other = fit(tmp_path, FedDyn(), SAM(rho=0)), fit(tmp_path, FedDyn())
    assert torch.equal(one._session.federation.params, other._session.federation.params)


def test_communication_counts_the_vectors_of_algorithm_and_perturbation(tmp_path):
    """15 parameters of 4 bytes and two clients: 120 bytes for each vector."""
    for algorithm, down, up in ((FedAvg(), 1, 1), (Scaffold(), 2, 2), (FedCM(), 2, 1)):
        trainer = fit(tmp_path, algorithm)
        assert float(trainer.callback_metrics["comm/down_mb"]) == pytest.approx(down * 120e-6)
        assert float(trainer.callback_metrics["comm/up_mb"]) == pytest.approx(up * 120e-6)

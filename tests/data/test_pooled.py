"""Central training: a hand-written loop over the pooled data is the twin."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedlight import FederatedTrainer
from fedlight.algorithms import FedDyn, FedSAM
from fedlight.callbacks import MAN
from fedlight.data import DatasetPartition, ImageData
from fedlight.data.federated import PooledData
from fedlight.models import MLP, Classifier
from fedlight.perturbations import SAM
from fedlight.seeding import generator

ROUNDS, EPOCHS, BATCH, SEED = 3, 2, 40, 7


def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier(MLP(64, 10, [16]), num_classes=10).double()


def data() -> ImageData:
    return ImageData("digits", num_clients=6, batch_size=BATCH, limit_samples=90, normalize="none")


def fit(module: Classifier, tmp_path, **settings) -> FederatedTrainer:
    trainer = FederatedTrainer(
        **{
            "max_rounds": ROUNDS,
            "local_epochs": EPOCHS,
            "seed": SEED,
            "default_root_dir": tmp_path,
            "accelerator": "cpu",
            "precision": "64-true",
            "enable_progress_bar": False,
            "engine": "eager",
            "centralized": True,
            **settings,
        }
    )
    trainer.fit(module, data())
    return trainer


def by_hand() -> torch.Tensor:
    """Plain SGD over all training images, in the order that client 0 would be drawn."""
    module, datamodule = model(), data()
    datamodule.setup()
    images, labels = datamodule.pooled_dataset().batch(torch.arange(90))
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for round in range(ROUNDS):
        rng = generator(SEED, "order", round, 0)
        for _ in range(EPOCHS):
            for rows in torch.randperm(90, generator=rng).split(BATCH):
                optimizer.zero_grad()
                cross_entropy(module.net(images[rows].double()), labels[rows]).backward()
                optimizer.step()
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_it_is_sgd_on_the_pooled_data(tmp_path):
    module = model()
    trainer = fit(module, tmp_path)
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in module.parameters()]), by_hand())
    assert trainer.global_step == ROUNDS * EPOCHS * 3
    assert trainer.method_name == "Central"
    assert float(trainer.callback_metrics["val/accuracy_all"]) == float(trainer.callback_metrics["val/accuracy"])
    assert "clients/accuracy_mean" not in trainer.callback_metrics


@pytest.mark.parametrize("algorithm", [FedDyn(alpha=0.5), FedSAM()])
def test_algorithm_sampler_and_fraction_play_no_part(tmp_path, algorithm):
    module = model()
    fit(module, tmp_path, algorithm=algorithm, clients_per_round=0.3)
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in module.parameters()]), by_hand())


def test_perturbation_and_penalty_stay(tmp_path):
    module = model()
    trainer = fit(module, tmp_path, perturbation=SAM(), callbacks=[MAN(zeta=0.1)], max_rounds=1)
    assert trainer.method_name == "Central+SAM+MAN"
    assert float(trainer.callback_metrics["train/penalty"]) > 0


def test_any_datamodule_can_be_pooled():
    class Rows(torch.utils.data.Dataset):
        targets = (0, 1, 0, 1, 0)

        def __len__(self):
            return 5

        def __getitem__(self, i):
            return torch.full((2,), float(i)), self.targets[i]

    inner = DatasetPartition(Rows(), num_clients=2, batch_size=2)
    pooled = PooledData(inner)
    pooled.setup()
    assert pooled.num_clients == 1
    assert pooled.client_size(0) == 5
    assert sorted(float(x[0]) for x, _ in (pooled.client_dataset(0)[i] for i in range(5))) == [0, 1, 2, 3, 4]
    assert pooled.partition_counts().tolist() == [[3, 2]]
    assert pooled.client_val_dataset(0) is None
    assert pooled.val_dataset() is inner.val_dataset()
    with pytest.raises(IndexError, match="no client 1"):
        pooled.client_dataset(1)

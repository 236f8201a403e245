"""Adapters on a frozen base, as LoRA has them: what crosses, what is perturbed, and that the base is there once."""

from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

from fedlight import MAN
from fedlight.algorithms import SCAFFOLD
from fedlight.data import DatasetPartition
from fedlight.engines.vmap.stacked_clients import StackedClients
from fedlight.perturbations import SAM
from tests.helpers.tiny import Regression, quiet_trainer, seeded

WIDTH, RANK, CLIENTS = 64, 2, 5
ADAPTER = 2 * RANK * WIDTH


class Lora(nn.Module):
    """W x + B A x with W frozen (Hu et al., ICLR 2022, equation 3)."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.a, self.b = nn.Parameter(seeded(RANK, WIDTH, seed=1) / 8), nn.Parameter(torch.zeros(WIDTH, RANK))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


class Seen:
    """Where the base was in each training step, and how often it had been written to."""

    bases: ClassVar[list[tuple[int, int]]] = []


class Model(Regression):
    def __init__(self):
        super().__init__(lr=0.05, net=nn.Sequential(Lora(), nn.ReLU(), nn.Linear(WIDTH, 1)))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter /= 4
        self.net[2].requires_grad_(False)

    @property
    def base(self):
        return self.net[0].base.weight

    def training_step(self, batch, batch_idx):
        Seen.bases.append((self.base.data_ptr(), self.base._version))
        return super().training_step(batch, batch_idx)


def train(folder, engine="eager", **settings):
    x = seeded(60, WIDTH)
    data = DatasetPartition(TensorDataset(x, x[:, 0]), num_clients=CLIENTS, batch_size=4)
    settings = {"perturbation": SAM(0.05), "callbacks": [MAN(0.5)], **settings}
    trainer, module = quiet_trainer(folder, algorithm=SCAFFOLD(), engine=engine, max_rounds=2, **settings), Model()
    before = module.base.data_ptr(), module.base.detach().clone()
    trainer.fit(module, data)
    assert (module.base.data_ptr(), module.base.requires_grad) == (before[0], False)
    assert torch.equal(module.base, before[1])
    return trainer, module


def adapters(module):
    return torch.cat([module.net[0].a.detach().flatten(), module.net[0].b.detach().flatten()])


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    Seen.bases.clear()
    return *train(tmp_path_factory.mktemp("eager")), list(Seen.bases)


def test_only_adapters_cross(eager):
    trainer, _, _ = eager
    # SCAFFOLD sends a control beside the model, in both directions.
    both = 2 * 2 * ADAPTER * 4 / 1e6  # two clients, two vectors, float32
    assert float(trainer.callback_metrics["comm/up_mb"]) == pytest.approx(both)
    assert float(trainer.callback_metrics["comm/down_mb"]) == pytest.approx(both)


def test_no_client_and_no_state_has_a_base_of_its_own(eager):
    trainer, module, bases = eager
    assert set(bases) == {bases[0]}
    state = trainer._session.federation.state_dict()
    held = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    assert len(held) > 5
    assert max(leaf.numel() for leaf in held) == ADAPTER
    saved = torch.load(trainer.run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    large = [leaf for leaf in tree_leaves(saved) if isinstance(leaf, torch.Tensor) and leaf.numel() > ADAPTER]
    assert [leaf.shape for leaf in large] == [module.base.shape]


def test_sam_and_man_act_on_adapters(tmp_path, eager):
    trainer, module, _ = eager
    for name, settings in (("sam", {"perturbation": None}), ("man", {"callbacks": []})):
        _, other = train(tmp_path / name, **settings)
        assert (adapters(other) - adapters(module)).abs().max() > 1e-5
    assert float(trainer.callback_metrics["man/net.1"]) > 0


def test_clients_side_by_side_share_the_base(tmp_path, eager, monkeypatch):
    _, module, _ = eager
    sizes: list[tuple[int, int]] = []
    run = StackedClients.run

    def counted(self, steps=None):
        rows = [*self._rows.values()]
        sizes.extend((len(value), value[0].numel()) for value in rows)
        return run(self, steps)

    monkeypatch.setattr(StackedClients, "run", counted)
    _, other = train(tmp_path, "vmap")
    torch.testing.assert_close(adapters(other), adapters(module), rtol=0, atol=1e-6)
    assert {count for count, _ in sizes} == {2}
    assert max(size for _, size in sizes) == ADAPTER

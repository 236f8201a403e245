"""What a run is made of stays on its device: on another than the CPU it ends in the same bits, and does not wait."""

import pytest
import torch
from torch import nn

from fedlight.algorithms import SCAFFOLD
from fedlight.callbacks import HessianSpectrum
from fedlight.models import Classifier
from fedlight.penalties.man import MAN
from fedlight.personal import APFL, Ditto, FineTune, PerFedAvg, PFedMe
from fedlight.perturbations import ASAM, SAM
from fedlight.server.aggregators import GeometricMedian, Krum, Median, TrimmedMean
from fedlight.transforms import (
    ALIE,
    ClipUpdate,
    DifferentialPrivacy,
    GaussianAttack,
    LabelFlip,
    Quantize,
    SignFlip,
    TopK,
)
from tests.contracts.combinations import combinations, outcome, run
from tests.helpers.elsewhere import ELSEWHERE, elsewhere
from tests.helpers.tiny import quiet_trainer, seeded, two_classes, weights

MANY = {"clients_per_round": 5, "num_clients": 5}
SETTINGS = {
    "views": lambda: {"views": ["server", "selected", "all", "swa"], "swa_start": 0.0},
    "clipped": lambda: {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
    "centralized": lambda: {"centralized": True},
    "rows on disk": lambda: {"client_state": "disk", "algorithm": SCAFFOLD()},
    "rows on the CPU": lambda: {"client_state": "cpu", "algorithm": SCAFFOLD(), "perturbation": SAM()},
    "double precision": lambda: {"precision": "64-true"},
    "spectrum": lambda: {"callbacks": [MAN(0.1), HessianSpectrum(every_n_rounds=3)], "perturbation": ASAM()},
    "parts": lambda: {"personal": ["net.3"]},
    **{cls.__name__: lambda cls=cls: {"personal": cls()} for cls in (APFL, Ditto, FineTune, PerFedAvg, PFedMe)},
    **{cls.__name__: lambda cls=cls: {"aggregator": cls(), **MANY} for cls in (GeometricMedian, Krum, Median)},
    "TrimmedMean": lambda: {"aggregator": TrimmedMean(), **MANY},
    **{cls.__name__: lambda cls=cls: {"transforms": [cls()]} for cls in (ClipUpdate, Quantize, TopK)},
    **{
        cls.__name__: lambda cls=cls: {"transforms": [cls(clients=[0, 1])], "clients_per_round": 4}
        for cls in (ALIE, GaussianAttack, LabelFlip, SignFlip)
    },
    "DifferentialPrivacy": lambda: {"transforms": [DifferentialPrivacy(noise_multiplier=1.0)]},
}
OPTIMIZERS = "SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Rprop", "Adagrad", "ASGD", "Adafactor"
QUICK = "eager-rows on the CPU", "eager-Krum", "eager-DifferentialPrivacy", "eager-Adam", "vmap-rows on the CPU"


class Net(Classifier):
    """A network with buffers and random numbers.

    Args:
        optimizer: what of torch's it is trained with.
        normalise: whether it has a BatchNorm layer.
    """

    def __init__(self, optimizer="SGD", normalise=True):
        layers = [nn.Linear(3, 6), nn.ReLU(), nn.BatchNorm1d(6) if normalise else nn.Identity(), nn.Linear(6, 2)]
        super().__init__(nn.Sequential(*layers), 2)
        self.kind = getattr(torch.optim, optimizer)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(seeded(*parameter.shape, seed=i))

    def configure_optimizers(self):
        return self.kind(self.parameters(), lr=0.01)


def trained(folder, name, engine, rounds=(3,)):
    """What server and clients hold after so many rounds, each time resumed, and what was logged last."""
    settings = SETTINGS[name]() if name in SETTINGS else {}
    data = two_classes(num_clients=settings.pop("num_clients", 4))
    for last in rounds:
        model = Net(name if name in OPTIMIZERS else "SGD", name != "DifferentialPrivacy")
        trainer = quiet_trainer(folder, **{"max_rounds": last, "engine": engine, "enable_plots": False, **settings})
        trainer.fit(model, data, ckpt_path=None if last == rounds[0] else "last")
    assert trainer.federation.state.views["server"].device == (ELSEWHERE if len(rounds) > 1 else torch.device("cpu"))
    logged = {
        key: value for key, value in trainer.callback_metrics.items() if not key.startswith(("time/", "hessian/s"))
    }
    return {k: v.cpu() for k, v in (outcome(trainer) | logged | {"model": weights(model)}).items()}


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        pytest.param(engine, name, marks=() if f"{engine}-{name}" in QUICK else pytest.mark.slow)
        for engine in ("eager", "vmap")
        for name in (*SETTINGS, *OPTIMIZERS)
        if engine == "eager" or name not in ("ASGD", "Adafactor")  # which it cannot step
    ],
)
def test_a_resumed_run_on_another_device_ends_in_the_same_bits(engine, name, tmp_path):
    here = trained(tmp_path / "here", name, engine)
    with elsewhere():
        there = trained(tmp_path / "there", name, engine, rounds=(2, 3))
    assert here.keys() == there.keys()
    assert [key for key in here if not torch.equal(here[key], there[key])] == []


@pytest.mark.parametrize(
    "combination",
    [
        pytest.param(c, marks=() if str(c) in ("FedAdamW-SAM-MAN", "SCAFFOLD-SAM-MAN") else pytest.mark.slow, id=str(c))
        for c in combinations()
        if c.quick
    ],
)
def test_every_algorithm_on_another_device_ends_in_the_same_bits(combination, tmp_path):
    here = outcome(run(combination, tmp_path / "here")[0])
    with elsewhere():
        first, _, _ = run(combination, tmp_path / "there", max_rounds=1, enable_checkpointing=True)
        there = outcome(run(combination, tmp_path / "there", ckpt_path=first.run_dir / "checkpoints" / "last.ckpt")[0])
        there = {key: value.cpu() for key, value in there.items()}
    assert here.keys() == there.keys()
    assert [key for key in here if not torch.equal(here[key], there[key])] == []


@pytest.mark.parametrize("optimizer", ["SGD", pytest.param("Adam", marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ["eager", "vmap"])
def test_nobody_waits_for_the_device_within_a_clients_round(engine, optimizer, tmp_path):
    settings = {"engine": engine, "max_rounds": 2, "enable_plots": False, "enable_checkpointing": False}
    settings |= {"callbacks": [MAN(0.1)], "perturbation": SAM(), "gradient_clip_val": 0.1}
    waits = []
    for steps in (2, 9):
        with elsewhere() as device:
            trainer = quiet_trainer(tmp_path, **settings, local_steps=steps)
            trainer.fit(Net(optimizer), two_classes())
        waits.append(len(device.waits))
    assert 0 < waits[1] <= waits[0]


def test_the_device_computes_and_refuses_as_a_gpu_does():
    with elsewhere() as device:
        x = torch.arange(6.0, device=ELSEWHERE).reshape(2, 3)
        x[1] += 1
        assert x.device == ELSEWHERE
        assert (2 * x.T)[[0, 2]].tolist() == [[0, 8], [4, 12]]
        assert float(x.new_tensor([2.0, 3.0]).sum()) == 5.0
        assert device.waits == ["_to_copy", "_local_scalar_dense"]
        y = (x * torch.tensor(2.0)).requires_grad_()
        y.square().sum().backward()
        assert torch.equal(y.grad.cpu(), 4 * x.cpu())
        with pytest.raises(RuntimeError, match="one device"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="one device"):
            torch.stack([x[0, 0], torch.tensor(1.0)])
        with pytest.raises(RuntimeError, match="generator of the device"):
            torch.randn(3, device=ELSEWHERE, generator=torch.Generator())

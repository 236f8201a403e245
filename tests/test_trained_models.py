"""A trained model is taken home: ``load_from_checkpoint``, ``torch.load``, ``fedlight export``."""

from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight import Classifier, ImageData
from fedlight.cli.command import main
from fedlight.data.partition import IID
from fedlight.models import MLP
from fedlight.run import results
from tests.helpers.tiny import Clients, Regression, quiet_trainer, seeded, weights

X = seeded(5, 1, 8, 8)


def model():
    return Classifier(MLP(64, 10, [8]), 10, partial(torch.optim.SGD, lr=0.3))


def data():
    return ImageData("digits", 4, IID(), limit_samples=80)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    trainer, module = quiet_trainer(tmp_path_factory.mktemp("trained"), max_rounds=1), model()
    trainer.fit(module, data())
    return trainer.run_dir, module.eval()


def test_one_line_of_lightning_and_one_of_torch(run):
    path, module = run[0] / "checkpoints" / "last.ckpt", run[1]
    loaded = Classifier.load_from_checkpoint(path)
    assert torch.equal(weights(loaded), weights(module))
    assert (loaded.optimizer(loaded.parameters()).defaults["lr"], loaded.net.in_features) == (0.3, 64)
    saved = torch.load(path)
    assert set(saved["state_dict"]) == set(module.state_dict())
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in saved["state_dict"].items())


def test_what_a_module_saved_is_what_its_checkpoint_holds(tmp_path):
    trainer = quiet_trainer(tmp_path, max_rounds=1)
    trainer.fit(Regression(lr=0.2), Clients())  # which does not tell what its network is
    path = trainer.run_dir / "checkpoints" / "last.ckpt"
    assert torch.load(path)["hyper_parameters"] == {"lr": 0.2}
    assert Regression.load_from_checkpoint(path).lr == 0.2


def exported(run, to, **options):
    trainer = quiet_trainer(run[0].parents[1])
    trainer.export(model(), data(), "last", to=to, **options)
    return to


def test_weights(run, tmp_path):
    fresh = model()
    fresh.load_state_dict(torch.load(exported(run, tmp_path / "new" / "model.pt")))
    assert torch.equal(weights(fresh), weights(run[1]))
    other = torch.load(exported(run, tmp_path / "all.pt", view="all"))
    assert not torch.equal(other["net.fc1.weight"], fresh.state_dict()["net.fc1.weight"])


def test_a_program_computes_the_same_for_any_number_of_samples(run, tmp_path):
    program = torch.export.load(exported(run, tmp_path / "model.pt2")).module()
    for count in (1, 5):
        assert torch.allclose(program(X[:count]), run[1](X[:count]), atol=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_an_example_of_one_sample_stands_for_any_number(tmp_path, monkeypatch, precision):
    monkeypatch.setattr(Regression, "example_input_array", torch.zeros(1, 3))
    quiet_trainer(tmp_path, precision=precision).export(Regression(), Clients(), to=tmp_path / "a.pt2")
    dtype = torch.float64 if precision.startswith("64") else torch.float32
    assert len(torch.export.load(tmp_path / "a.pt2").module()(torch.zeros(5, 3, dtype=dtype))) == 5


@pytest.mark.slow
def test_onnx_computes_the_same(run, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(exported(run, tmp_path / "model.onnx")))
    for count in (1, 5):
        (found,) = session.run(["output"], {"input": X[:count].numpy()})
        assert torch.allclose(torch.from_numpy(found), run[1](X[:count]), atol=1e-5)


class Pairs(Regression):
    def forward(self, x, *, weight, scale=None):
        return super().forward(x * weight) * (1 if scale is None else scale) + x.new_zeros(len(x))


@pytest.mark.parametrize("rows", [1, 4])
def test_a_forward_of_several_arguments_is_exported_as_it_is_called(tmp_path, monkeypatch, rows):
    example = {"x": torch.zeros(rows, 3), "weight": torch.zeros(rows, 3), "scale": torch.ones(())}
    monkeypatch.setattr(Regression, "example_input_array", example)
    module, x, scale = Pairs(), seeded(5, 3), torch.tensor(2.0)
    quiet_trainer(tmp_path).export(module, Clients(), to=tmp_path / "a.pt2")
    program = torch.export.load(tmp_path / "a.pt2").module()
    assert torch.allclose(program(x=x, weight=x + 1, scale=scale), module(x, weight=x + 1, scale=scale))


class Branching(Regression):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x[:, 0]


def test_what_cannot_be_exported_is_said(run, tmp_path, monkeypatch):
    trainer = quiet_trainer(tmp_path)
    with pytest.raises(MisconfigurationException, match=r"to='model.h5' must end in .pt"):
        exported(run, "model.h5")
    with pytest.raises(MisconfigurationException, match="cannot export Pairs.forward: TypeError.* Set example_input"):
        trainer.export(Pairs(), Clients(), to=tmp_path / "a.pt2")
    with pytest.raises(MisconfigurationException, match="torch cannot export Branching.forward"):
        trainer.export(Branching(), Clients(), to=tmp_path / "a.pt2")
    monkeypatch.setattr(Regression, "example_input_array", {})
    with pytest.raises(
        MisconfigurationException, match="Regression.forward, as what it takes is not known. Set example"
    ):
        trainer.export(Regression(), Clients(), to=tmp_path / "a.pt2")
    monkeypatch.setattr(results, "find_spec", lambda name: None)
    with pytest.raises(MisconfigurationException, match=r"needs ONNX: pip install .fedlight\[onnx\]"):
        exported(run, tmp_path / "a.onnx")
    assert not list(tmp_path.glob("*.*"))


def test_the_command_line(run, tmp_path):
    main(["export", "-c", str(run[0] / "config.yaml"), "--ckpt_path", "last", "--to", str(tmp_path / "model.pt")])
    assert torch.equal(torch.load(tmp_path / "model.pt")["net.fc1.weight"], run[1].net.fc1.weight)

"""Layers frozen before training stay out of the vector; later changes are refused by name, and nothing is written."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn

from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights


class Deep(Regression):
    """Two layers of one shape."""

    def __init__(self):
        super().__init__(net=nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)))

    def freeze(self, *args):
        self.net[0].requires_grad_(False)


class InSetup(Deep):
    def setup(self, stage):
        self.freeze()


class InConfigureModel(Deep):
    configure_model = Deep.freeze


class InFitStart(Deep):
    on_fit_start = Deep.freeze


class Freezes(Callback):
    def on_fit_start(self, trainer, module):
        module.freeze()


@pytest.mark.parametrize("model", [InSetup, InConfigureModel, InFitStart, Deep])
def test_freezing_before_training_is_honoured_and_resumed(tmp_path, model):
    settings = {"callbacks": [Freezes()]} if model is Deep else {}
    module, twin = model(), Deep()
    whole = quiet_trainer(tmp_path / "whole", **settings)
    whole.fit(module, Clients())
    assert whole._session.layout.numel == 16
    assert torch.equal(module.net[0].weight, twin.net[0].weight)
    assert not torch.equal(module.net[1].weight, twin.net[1].weight)
    first = quiet_trainer(tmp_path, max_rounds=1, **settings)
    first.fit(model(), Clients())
    checkpoint, resumed = first.run_dir / "checkpoints" / "last.ckpt", model()
    with torch.no_grad():
        resumed.net[0].weight.zero_()  # it is read from the checkpoint
    quiet_trainer(tmp_path, **settings).fit(resumed, Clients(), ckpt_path=checkpoint)
    assert torch.equal(weights(resumed), weights(module))


def test_a_checkpoint_of_a_frozen_run_is_evaluated_as_it_was_trained(tmp_path):
    trainer, module = quiet_trainer(tmp_path), InFitStart()
    trainer.fit(module, Clients())
    fresh = InFitStart()
    found = quiet_trainer(tmp_path).validate(fresh, Clients(), "last", verbose=False)[0]
    assert found["val/loss"] == pytest.approx(float(trainer.callback_metrics["val/loss"]))
    assert torch.equal(weights(fresh), weights(module))


def test_a_run_that_trains_other_parameters_is_another_experiment(tmp_path):
    quiet_trainer(tmp_path, max_rounds=1).fit(InFitStart(), Clients())
    InFitStart.on_fit_start = lambda self: None
    try:
        with pytest.raises(MisconfigurationException, match=r"of another experiment:\s+model.trained"):
            quiet_trainer(tmp_path).fit(InFitStart(), Clients(), ckpt_path="last")
    finally:
        InFitStart.on_fit_start = Deep.freeze


def hook(name, act):
    return type(name, (Deep,), {name: lambda self, *args: act(self)})


def swaps(module):
    module.net[0].requires_grad_(False)


def unfreezes(module):
    module.requires_grad_(True)


LATE = ("on_train_start", "on_round_start", "on_client_start", "on_train_epoch_start", "on_train_batch_start")


@pytest.mark.parametrize("name", [*LATE, "on_train_batch_end", "on_train_epoch_end", "on_client_end"])
def test_freezing_later_is_refused_by_name_before_anything_is_written(tmp_path, name):
    module = hook(name, swaps)()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    trainer = quiet_trainer(tmp_path)
    with pytest.raises(MisconfigurationException, match=r"'net.0.bias' was frozen, 'net.0.weight' was frozen") as error:
        trainer.fit(module, Clients())
    assert "freeze them in __init__, configure_model, setup or on_fit_start" in str(error.value)
    assert trainer._session.federation.state.round == 0
    assert torch.equal(trainer._session.federation.params, torch.cat([v.reshape(-1) for v in before.values()]))


@pytest.mark.parametrize("engine", ["eager", "vmap"])
def test_unfreezing_later_is_refused_by_name(tmp_path, engine):
    module = hook("on_round_start", unfreezes)()
    module.freeze()
    with pytest.raises(MisconfigurationException, match="'net.0.bias' was unfrozen or added"):
        quiet_trainer(tmp_path, engine=engine).fit(module, Clients())


def test_a_step_that_freezes_is_found(tmp_path):
    class Step(Deep):
        def training_step(self, batch, batch_idx):
            self.freeze()
            return super().training_step(batch, batch_idx)

    with pytest.raises(MisconfigurationException, match="'net.0.weight' was frozen"):
        quiet_trainer(tmp_path).fit(Step(), Clients())


def test_a_parameter_whose_data_is_replaced_is_refused_by_name(tmp_path):
    class Clips(Deep):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.net[1].weight.data = self.net[1].weight.data.clamp(-1, 1)

    with pytest.raises(MisconfigurationException, match=r"the data of parameter 'net.1.weight' is replaced"):
        quiet_trainer(tmp_path).fit(Clips(), Clients())

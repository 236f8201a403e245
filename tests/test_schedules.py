"""Hyperparameters that follow the round: their values, where they are found, what is refused, and what a run keeps."""

import inspect
import math

import numpy as np
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from fedlight import algorithms, perturbations, transforms
from fedlight.algorithms import FedAvgM, FedCM, FedDyn, FedWMSAM
from fedlight.cli.command import main
from fedlight.data import DirichletClients
from fedlight.penalties.base import Penalty
from fedlight.penalties.man import MAN
from fedlight.penalties.numbers import at, check_hyperparameter, current, follow, scheduled
from fedlight.perturbations import SAM
from fedlight.report.naming import Method, method_labels
from fedlight.run.loggers import read_metrics
from fedlight.run.names import dotted
from tests.algorithms.driver import Driver
from tests.callbacks.nets import Lit, batches
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights

LINEAR = {"schedule": "linear", "from": 0.0, "to": 0.05, "rounds": 50}


def constant(value):
    return {"schedule": "cosine", "from": value, "to": value, "rounds": 3}


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (LINEAR, {0: 0.0, 1: 0.001, 25: 0.025, 49: 0.049, 50: 0.05, 900: 0.05}),
        ({"schedule": "linear", "from": 1, "to": 0, "rounds": 4, "after": 2}, {0: 1, 2: 1, 3: 0.75, 6: 0, 7: 0}),
        # (1 − cos(π/4))/2 and (1 − cos(π/2))/2
        ({"schedule": "cosine", "from": 0, "to": 2, "rounds": 4}, {0: 0, 1: 0.2928932188134524, 2: 1.0, 4: 2}),
        (
            {"schedule": "exponential", "from": 1, "to": 0.01, "rounds": 4},
            {0: 1, 2: 0.1, 3: 0.1**1.5, 4: 0.01, 5: 0.01},
        ),
        ({"schedule": "linear", "from": 0.1, "to": 0.3, "rounds": 1, "after": 9}, {9: 0.1, 10: 0.3}),
    ],
)
def test_the_value_of_each_round(schedule, values):
    assert {round: at(schedule, round) for round in values} == pytest.approx(values, rel=1e-12)
    rho = SAM(schedule).rho
    for round, value in values.items():
        follow([rho], round)
        assert rho.item() == pytest.approx(value, rel=1e-12)


def wrong(**changed):
    return {key: value for key, value in {**LINEAR, **changed}.items() if value is not None}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAM(wrong(rounds=0)), r"perturbation\.rho\.rounds must be a whole number of at least 1, found 0"),
        (lambda: SAM(wrong(rounds=-3)), r"perturbation\.rho\.rounds must .* found -3"),
        (lambda: SAM(wrong(rounds=True)), r"perturbation\.rho\.rounds must .* found True"),
        (lambda: SAM(wrong(rounds=2.5)), r"perturbation\.rho\.rounds must .* found 2\.5"),
        (lambda: SAM(wrong(after=-1)), r"perturbation\.rho\.after must be a whole number of at least 0, found -1"),
        (lambda: SAM(wrong(to=-0.1)), r"perturbation\.rho\.to must be a finite number at least 0, found -0\.1"),
        (lambda: MAN(wrong(to=math.inf)), r"MAN\.zeta\.to must be a finite number at least 0, found inf"),
        (
            lambda: SAM(wrong(schedule="step")),
            r"perturbation\.rho\.schedule must be one of linear, cosine, expon",
        ),
        (lambda: SAM(wrong(schedule="exponential")), r"rho\.schedule must .* exponential \(between numbers > 0\)"),
        (lambda: SAM(wrong(rounds=None)), r"perturbation\.rho: the schedule lacks rounds\. Write \{schedule: linear, "),
        (lambda: SAM(wrong(epochs=3)), r"perturbation\.rho: the schedule has an unknown key epochs\. Write"),
        (
            lambda: FedCM(wrong(to=1.5)),
            r"algorithm\.alpha\.from must be a finite number above 0 and at most 1",
        ),
        (lambda: FedCM(wrong(**{"from": 1, "to": 1.5})), r"algorithm\.alpha\.to .* at most 1, found 1\.5"),
        (lambda: DirichletClients(LINEAR), r"partitioner\.alpha` must be a finite number above 0, found \{"),
        (lambda: FedWMSAM(alpha=constant(0.5)), r"algorithm\.alpha must be a finite number .* found \{"),  # it adapts
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_by_key(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def hyperparameters(module, name):
    """What takes a schedule, with its default: all numbers but those that say what something begins with, or who."""
    parameters = inspect.signature(getattr(module, name)).parameters.values()
    return {p.name: p.default or 1.0 for p in parameters if "dict[str" in str(p.annotation)}


METHODS = [(module, name) for module in (algorithms, perturbations, transforms) for name in module.__all__]
METHODS = [
    (module, name) for module, name in METHODS if name not in ("Message", "Algorithm", "Perturbation", "Transform")
]


@pytest.mark.parametrize(("module", "name"), METHODS, ids=[name for _, name in METHODS])
def test_every_hyperparameter_can_follow_and_is_found(module, name):
    defaults = hyperparameters(module, name)
    numbers = {p.name for p in inspect.signature(getattr(module, name)).parameters.values() if type(p.default) is float}
    assert numbers - defaults.keys() == {"FedWMSAM": {"alpha"}}.get(name, numbers & {"initial_accumulator", "clients"})
    made = getattr(module, name)(**{key: constant(value) for key, value in defaults.items()})
    inner = [vars(part) for key in ("perturbation", "penalty") if (part := getattr(made, key, None)) is not None]
    found = {tensor.key.rsplit(".", 1)[1] for tensor in scheduled(vars(made), *inner)}
    assert found == defaults.keys()


@pytest.mark.parametrize(
    "name",
    [n for module, n in METHODS if module is algorithms and n not in ("FedOpt", "FedBN", "FedAdamW", "FedMuon")],
)
def test_a_constant_schedule_changes_no_bit_of_an_algorithm(name):
    cls, defaults = getattr(algorithms, name), hyperparameters(algorithms, name)
    one = Driver(cls(**defaults)).run()
    other = Driver(cls(**{key: constant(value) for key, value in defaults.items()})).run()
    assert all((a == b).all() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_on_the_server_may_begin_at_zero(nesterov):
    """What the optimizer keeps is there from the first round on, so that a checkpoint can be compared; v is Δ then."""
    schedule = {"schedule": "linear", "from": 0, "to": 0.5, "rounds": 1}
    driver = Driver(FedAvgM(momentum=schedule, nesterov=nesterov))
    names = set(driver.server)
    assert "optimizer.momentum_buffer" in names
    *_, before, after = driver.run()
    assert set(driver.server) == names
    np.testing.assert_allclose(driver.server["optimizer.momentum_buffer"], before - after, rtol=0, atol=1e-12)


def net():
    return Regression(0.05, nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)))


def trainer(root, rounds, rho_to=0.4, **settings):
    return quiet_trainer(
        root,
        algorithm=FedDyn({"schedule": "exponential", "from": 0.2, "to": 0.05, "rounds": 3}),
        perturbation=SAM({"schedule": "linear", "from": 0, "to": rho_to, "rounds": 2, "after": 1}),
        callbacks=[MAN({"schedule": "linear", "from": 0, "to": 0.3, "rounds": 3}), MAN(constant(0.1), ["net.1"])],
        max_rounds=rounds,
        clients_per_round=4,
        **settings,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four rounds, and the same one stopped after two."""
    root = tmp_path_factory.mktemp("runs")
    made = {}
    for name, rounds in (("whole", 4), ("half", 2)):
        made[name] = trainer(root, rounds, name=name, enable_checkpointing=True)
        made[name].fit(net(), Clients())
    return made


def test_the_row_of_a_round_has_its_values(whole):
    rows = read_metrics(whole["whole"].run_dir / "metrics.csv")
    columns = {key: [row[key] for row in rows] for key in rows[0] if key.startswith("schedule/")}
    assert columns == {
        "schedule/algorithm.alpha": pytest.approx([0.2, 0.2 * 0.25 ** (1 / 3), 0.2 * 0.25 ** (2 / 3), 0.05]),
        "schedule/perturbation.rho": pytest.approx([0, 0, 0.2, 0.4]),
        "schedule/MAN.zeta": pytest.approx([0, 0.1, 0.2, 0.3]),
        "schedule/MAN.zeta_2": pytest.approx([0.1] * 4),
    }
    assert rows[0]["clients/gradients"] == rows[3]["clients/gradients"]  # also while ρ is 0
    assert whole["whole"].method_name == "FedDyn+SAM+MAN+MAN"


def test_a_continued_run_has_the_values_of_its_rounds(whole):
    half = whole["half"].run_dir
    again = trainer(half.parents[1], 4, name="half", enable_checkpointing=True)
    module = net()
    again.fit(module, Clients(), ckpt_path=half / "checkpoints" / "last.ckpt")
    assert torch.equal(weights(module), whole["whole"].federation.params)


def test_another_schedule_is_another_experiment(whole, tmp_path):
    other = trainer(tmp_path, 4, rho_to=0.5)
    with pytest.raises(MisconfigurationException, match=r"perturbation\.rho\.to: 0\.4 in the checkpoint, 0\.5 here"):
        other.fit(net(), Clients(), ckpt_path=whole["half"].run_dir / "checkpoints" / "last.ckpt")


def test_config_yaml_has_the_schedules_and_makes_them_again(whole):
    config = yaml.safe_load((whole["whole"].run_dir / "config.yaml").read_text())
    rho = {"schedule": "linear", "from": 0, "to": 0.4, "rounds": 2, "after": 1}
    assert config["perturbation"]["init_args"] == {"rho": rho}
    assert config["algorithm"]["init_args"]["alpha"]["schedule"] == "exponential"
    assert config["trainer"]["callbacks"][0]["init_args"]["zeta"]["to"] == 0.3
    label = method_labels([Method(dotted(config)), Method(dotted({**config, "perturbation": {"class_path": "SAM"}}))])
    assert (
        "FedDyn+SAM+MAN+MAN (SAM.rho=linear 0 to 0.4 in 2 rounds after 1)".replace("SAM.rho", "rho") in label.values()
    )


def test_a_schedule_that_is_longer_than_the_run_is_said(tmp_path, capsys, caplog):
    quiet_trainer(tmp_path, perturbation=SAM(LINEAR), max_rounds=1).fit(Regression(), Clients())
    said = "perturbation.rho: its schedule ends after 50 rounds, and training before."
    assert (capsys.readouterr().err + caplog.text).count(said) == 1


@pytest.mark.slow
def test_the_command_line_takes_schedules(capsys):
    quick = ["fit", "-c", "quickstart", "--trainer.fast_dev_run=true", "--trainer.enable_progress_bar=false"]
    with pytest.raises(SystemExit):
        main([*quick, "--perturbation=SAM", "--perturbation.rho={schedule: linear, from: 0, to: -1, rounds: 50}"])
    assert "perturbation.rho.to must be a finite number at least 0, found -1" in capsys.readouterr().err
    schedule = "{'schedule': 'linear', 'from': 0, 'to': 0.05, 'rounds': 1}"  # as sweeps write it
    main([*quick, "--trainer.devices=1", "--perturbation=SAM", f"--perturbation.rho={schedule}", "--algorithm=FedExP"])


SEEN = []


class Watched(Lit):
    def on_train_batch_end(self, *args):
        SEEN.append(float(self._penalized_step.penalties[0].zeta))


def test_in_lightnings_trainer_a_schedule_counts_epochs(tmp_path):
    SEEN.clear()
    man = MAN({"schedule": "linear", "from": 0.1, "to": 0.3, "rounds": 2})
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(max_epochs=4, callbacks=[man], default_root_dir=tmp_path, enable_model_summary=False, **options).fit(
        Watched(), DataLoader(batches(1), batch_size=None)
    )
    assert pytest.approx([0.1, 0.2, 0.3, 0.3]) == SEEN


def test_a_loop_of_your_own_has_to_say_which_epoch_it_is():
    man, module = MAN({"schedule": "linear", "from": 0, "to": 0.4, "rounds": 4}), Lit()
    with pytest.raises(MisconfigurationException, match=r"A schedule is to be followed: MAN\.follow\(epoch\) before"):
        man.attach(module)
    expected = {}
    for epoch in (0, 3):
        with MAN(0.1 * epoch).attached(module) as step:
            module.training_step(batches(1)[0], 0)
        expected[epoch] = step.penalty
    man.follow(0)
    with man.attached(module) as step:
        for epoch in (0, 3):
            man.follow(epoch)
            module.training_step(batches(1)[0], 0)
            torch.testing.assert_close(step.penalty, expected[epoch])
            assert step.penalty.dtype == expected[epoch].dtype


class Weighted(Penalty):
    """A penalty that is written as for numbers."""

    def __init__(self, weight):
        self.weight = check_hyperparameter("Weighted.weight", weight)

    def penalty(self, module, measured):
        return self.weight * sum(p.square().sum() for p in module.parameters())


def test_a_penalty_of_ones_own_keeps_the_loss_in_its_type():
    penalty, module, batch = Weighted({"schedule": "linear", "from": 0, "to": 0.4, "rounds": 4}), Lit(), batches(1)[0]
    penalty.follow(2)
    with penalty.attached(module.float()) as step:
        loss = module.training_step([batch[0].float(), batch[1]], 0)
    assert loss.dtype == torch.float32
    square = sum(float(p.detach().double().square().sum()) for p in module.parameters())
    assert float(step.penalty) == pytest.approx(0.2 * square, rel=1e-6)


def test_what_python_needs_of_a_schedule_is_known_without_its_tensor():
    rho = check_hyperparameter("x", {"schedule": "linear", "from": 0, "to": 4, "rounds": 4})
    assert [current(0.5), current(rho)] == [0.5, 0.0]
    follow([rho], 3)
    rho.fill_(7.0)  # on a device, to look at it would be to wait
    assert current(rho) == 3.0

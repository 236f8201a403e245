"""configure_optimizers in all its forms, and schedules per step, epoch and round."""

import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from fedlight.algorithms.fedavg import FedAvg
from fedlight.module import optimizers
from fedlight.module.optimizers import RoundSchedule, configure_optimizers
from tests.helpers.tiny import Clients, Keep, Regression, quiet_trainer, weights


class Scheduled(Regression):
    """Plain SGD with whatever ``make`` returns for it."""

    def __init__(self, make, lr=0.1):
        super().__init__(lr)
        self.make = make

    def configure_optimizers(self):
        return self.make(SGD(self.parameters(), lr=self.lr))


def scheduled(make, interval, **more):
    return Scheduled(lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": make(o), "interval": interval, **more}})


def learning_rates(tmp_path, model, sizes=(8, 8), **settings):
    """The learning rate of every local step, by round and client."""
    seen = {}

    class See(FedAvg):
        pass

    model_class = type(model)

    class Watched(model_class):
        def on_before_optimizer_step(self, optimizer):
            key = (self.current_epoch, self.client)
            seen.setdefault(key, []).append(optimizer.param_groups[0]["lr"])

        def on_client_start(self, client):
            self.client = client

    model.__class__ = Watched
    settings = {"max_rounds": 2, "clients_per_round": 1.0, "local_epochs": 2, **settings}
    quiet_trainer(tmp_path, algorithm=See(), **settings).fit(model, Clients(sizes=sizes))
    return seen


def test_a_schedule_per_step_starts_anew_with_each_client_and_round(tmp_path):
    seen = learning_rates(tmp_path, scheduled(lambda o: ExponentialLR(o, 0.5), "step"))
    assert len(seen) == 4
    for rates in seen.values():
        assert rates == pytest.approx([0.1, 0.05, 0.025, 0.0125])


def test_a_schedule_per_epoch_starts_anew_with_each_client_and_round(tmp_path):
    seen = learning_rates(tmp_path, scheduled(lambda o: StepLR(o, 1, 0.1), "epoch"))
    for rates in seen.values():
        assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01])
    default = learning_rates(tmp_path / "default", Scheduled(lambda o: ([o], [StepLR(o, 1, 0.1)])))
    assert default == seen


def test_a_schedule_per_round_counts_rounds(tmp_path):
    seen = learning_rates(tmp_path, scheduled(lambda o: ExponentialLR(o, 0.998), "round"), max_rounds=3)
    for (round, _), rates in seen.items():
        assert rates == pytest.approx([0.1 * 0.998**round] * 4, rel=1e-14)


def test_frequency_is_every_so_many(tmp_path):
    seen = learning_rates(tmp_path, scheduled(lambda o: ExponentialLR(o, 0.5), "round", frequency=2), max_rounds=5)
    assert [seen[(r, 0)][0] for r in range(5)] == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])
    steps = learning_rates(tmp_path, scheduled(lambda o: ExponentialLR(o, 0.5), "step", frequency=3))
    assert steps[(0, 0)] == pytest.approx([0.1, 0.1, 0.1, 0.05])


def test_the_learning_rate_of_a_round_is_logged(tmp_path):
    trainer = quiet_trainer(tmp_path, max_rounds=3)
    trainer.fit(scheduled(lambda o: ExponentialLR(o, 0.5), "round"), Clients())
    assert trainer.callback_metrics["lr"].item() == pytest.approx(0.025)


def test_several_groups_keep_their_own_rates(tmp_path):
    class Groups(Regression):
        def configure_optimizers(self):
            o = SGD([{"params": [self.net.weight], "lr": 0.1}, {"params": [self.net.bias], "lr": 0.02}])
            return {"optimizer": o, "lr_scheduler": {"scheduler": ExponentialLR(o, 0.5), "interval": "round"}}

    seen = []

    class Watched(Groups):
        def on_before_optimizer_step(self, optimizer):
            seen.append([g["lr"] for g in optimizer.param_groups])

    quiet_trainer(tmp_path, max_rounds=2, clients_per_round=1).fit(Watched(), Clients(sizes=(4,)))
    assert seen == [[0.1, 0.02], [0.05, 0.01]]


class Plateau(Scheduled):
    """A validation loss that never improves."""

    def __init__(self, **more):
        def make(o):
            scheduler = ReduceLROnPlateau(o, factor=0.1, patience=1)
            return {"optimizer": o, "lr_scheduler": {"scheduler": scheduler, "interval": "round", **more}}

        super().__init__(make)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", 1.0)


def test_plateaus_are_seen_over_rounds(tmp_path):
    seen = learning_rates(tmp_path, Plateau(monitor="val/loss"), max_rounds=6)
    assert [seen[(r, 0)][0] for r in range(6)] == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.01, 0.001])


def test_plateaus_wait_for_an_evaluation(tmp_path):
    seen = learning_rates(tmp_path, Plateau(monitor="val/loss"), max_rounds=8, check_val_every_n_rounds=2)
    assert [seen[(r, 0)][0] for r in range(8)] == pytest.approx([0.1] * 6 + [0.01] * 2)


def test_a_plateau_of_something_unknown_is_an_error(tmp_path):
    with pytest.raises(MisconfigurationException, match="ReduceLROnPlateau.monitor='val/acc' was not logged"):
        quiet_trainer(tmp_path).fit(Plateau(monitor="val/acc"), Clients())
    with pytest.raises(MisconfigurationException, match="ReduceLROnPlateau cannot take interval 'step'"):
        quiet_trainer(tmp_path).fit(scheduled(ReduceLROnPlateau, "step", monitor="val/loss"), Clients())
    with pytest.raises(MisconfigurationException, match="ReduceLROnPlateau needs a `monitor`"):
        quiet_trainer(tmp_path).fit(scheduled(ReduceLROnPlateau, "epoch"), Clients())


def test_a_schedule_that_would_step_every_0_epochs_is_refused():
    with pytest.raises(MisconfigurationException, match="frequency=0 must be a whole number from 1 on"):
        configure_optimizers(scheduled(lambda o: ExponentialLR(o, 0.5), "epoch", frequency=0))


@pytest.mark.parametrize("interval", [{}, {"interval": "epoch"}, {"interval": "round"}])
def test_plateaus_of_epochs_are_those_of_rounds(tmp_path, interval, capsys):
    """Lightning's default interval; two rounds without improvement, patience 1."""

    def make(o):
        scheduler = ReduceLROnPlateau(o, factor=0.1, patience=1)
        return {"optimizer": o, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss", **interval}}

    model = Plateau()
    model.make = make
    seen = learning_rates(tmp_path, model, max_rounds=4)
    assert [seen[(r, 0)] for r in range(4)] == [pytest.approx([lr] * 4) for lr in (0.1, 0.1, 0.1, 0.01)]


def test_a_plateau_takes_the_monitor_beside_it_and_may_miss_it(tmp_path):
    model = Scheduled(lambda o: {"optimizer": o, "lr_scheduler": ReduceLROnPlateau(o, patience=0), "monitor": "lr"})
    seen = learning_rates(tmp_path, model, max_rounds=3)
    assert [seen[(r, 0)][0] for r in range(3)] == pytest.approx([0.1, 0.1, 0.01])
    lenient = scheduled(ReduceLROnPlateau, "epoch", monitor="nothing", strict=False)
    with pytest.warns(
        UserWarning, match="ReduceLROnPlateau.monitor='nothing' was not logged. Logged are .* Nothing comes of it"
    ):
        seen = learning_rates(tmp_path, lenient, max_rounds=2)
    assert seen[(1, 0)][0] == 0.1


class OneCycle(Regression):
    """One cycle of as many steps as Lightning's trainer says that there are."""

    def __init__(self, steps=None, **more):
        super().__init__()
        self.steps, self.more = steps, more

    def configure_optimizers(self):
        o = SGD(self.parameters(), lr=0.1, momentum=0.9)
        steps = self.trainer.estimated_stepping_batches if self.steps is None else self.steps
        return [o], [{"scheduler": OneCycleLR(o, 1.0, total_steps=steps), "interval": "step", **self.more}]


def one_cycle(steps):
    o = SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    scheduler, rates = OneCycleLR(o, 1.0, total_steps=steps), []
    for _ in range(steps):
        rates.append(o.param_groups[0]["lr"])
        o.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("engine", ["eager", "vmap"])
def test_one_cycle_lasts_as_long_as_the_round_of_each_client(tmp_path, engine):
    """Clients of 5 and 12 samples take four and six steps in two epochs."""
    keep = Keep()
    settings = {"algorithm": keep, "engine": engine, "clients_per_round": 1.0, "max_rounds": 1, "local_epochs": 2}
    quiet_trainer(tmp_path, **settings).fit(OneCycle(), Clients(sizes=(5, 12)))
    found = [(r.num_steps, r.lr_sum) for r in keep.rounds[0]]
    assert found == [(steps, pytest.approx(sum(one_cycle(steps)))) for steps in (4, 6)]


def test_one_cycle_in_every_step(tmp_path):
    seen = learning_rates(tmp_path, OneCycle(), sizes=(5, 12))
    assert seen[(1, 0)] == pytest.approx(one_cycle(4))
    assert seen[(1, 1)] == pytest.approx(one_cycle(6))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (OneCycle(5), "of OneCycle: OneCycleLR ends after 5 steps, and a client's round has up to 6: "),
        (OneCycle(2, interval="round"), "OneCycleLR ends after 2 rounds, and trainer.max_rounds has up to 3: "),
        (OneCycle(2, interval="epoch"), "OneCycleLR ends after 2 epochs, and a client's round has up to 3: "),
        (OneCycle(9, interval="round"), "OneCycleLR changes momentum as well, and clients get the learning rate alone"),
    ],
)
def test_a_schedule_that_a_round_cannot_follow_is_found_before_training(tmp_path, model, message):
    trained = []
    model.on_client_start = lambda client: trained.append(client)
    settings = {"local_epochs": 3 if model.more.get("interval") == "epoch" else 2}
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(tmp_path, **settings).fit(model, Clients(sizes=(5, 12)))
    assert trained == []


def test_the_learning_rate_of_a_step_is_what_the_schedules_of_a_module_say(tmp_path):
    seen = []

    class Looks(OneCycle):
        def training_step(self, batch, batch_idx):
            seen.append((self.lr_schedulers().get_last_lr()[0], self.optimizers().param_groups[0]["lr"]))
            return super().training_step(batch, batch_idx)

    quiet_trainer(tmp_path, clients_per_round=1.0, max_rounds=1, local_epochs=2).fit(Looks(), Clients(sizes=(12,)))
    assert seen[-6:] == [(pytest.approx(lr), pytest.approx(lr)) for lr in one_cycle(6)]


def test_an_own_scheduler_step_of_the_default_form_is_the_default(tmp_path):
    class Own(Scheduled):
        def lr_scheduler_step(self, scheduler, metric):
            if metric is None:
                scheduler.step()
            else:
                scheduler.step(metric)

    def make(o):
        return {"optimizer": o, "lr_scheduler": {"scheduler": ExponentialLR(o, 0.5), "interval": "step"}}

    seen = learning_rates(tmp_path, Own(make))
    assert seen[(1, 1)] == pytest.approx([0.1, 0.05, 0.025, 0.0125])

    class Timm(Scheduled):
        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(epoch=self.current_epoch)

    with pytest.raises(MisconfigurationException, match=r"Timm.lr_scheduler_step gives ExponentialLR.step \[\(0,\)\]"):
        quiet_trainer(tmp_path).fit(Timm(make), Clients())


SCHEDULERS = {
    "exponential": lambda o: ExponentialLR(o, 0.9),
    "multistep": lambda o: MultiStepLR(o, [1, 3], 0.5),
    "lambda": lambda o: LambdaLR(o, lambda r: 1 / (1 + r)),
    "one cycle": lambda o: OneCycleLR(o, 0.2, total_steps=10, cycle_momentum=False),
    "sequential": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=2), ExponentialLR(o, 0.5)], milestones=[2]),
    "chained": lambda o: ChainedScheduler([ConstantLR(o, 0.1, total_iters=3), ExponentialLR(o, 0.9)], o),
    "plateau": lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:To get the last learning rate computed by the scheduler")
def test_schedules_of_rounds_go_on_after_a_resume(name):
    """State goes through a checkpoint's plain values at any round, and the rates that follow are the same."""
    make = SCHEDULERS[name]
    metrics = [{"val/loss": v} for v in (3.0, 2.0, 2.5, 2.5, 1.0, 1.5, 1.6, 1.7)]
    whole = RoundSchedule(scheduled(make, "round", monitor="val/loss"))
    rates, states = [], []
    for r, row in enumerate(metrics):
        states.append(whole.state_dict())
        rates.append(whole.lr)
        whole.advance("round", r + 1, row)
    for start, state in enumerate(states):
        torch.serialization.add_safe_globals([])
        resumed = RoundSchedule(scheduled(make, "round", monitor="val/loss"))
        resumed.load_state_dict(state)
        found = []
        for r in range(start, len(metrics)):
            found.append(resumed.lr)
            resumed.advance("round", r + 1, metrics[r])
        assert found == rates[start:]


@pytest.mark.parametrize(
    "make",
    [
        lambda o: o,
        lambda o: [o],
        lambda o: ([o], []),
        lambda o: {"optimizer": o},
        lambda o: [{"optimizer": o}],
        lambda o: ([o], [ExponentialLR(o, 1.0)]),
        lambda o: ([o], [{"scheduler": ExponentialLR(o, 1.0), "interval": "step", "name": "x"}]),
        lambda o: {"optimizer": o, "lr_scheduler": ExponentialLR(o, 1.0)},
        lambda o: {"optimizer": o, "lr_scheduler": ReduceLROnPlateau(o), "monitor": "val/loss"},
        lambda o: {"optimizer": o, "lr_scheduler": None},
        lambda o: ([o], ExponentialLR(o, 1.0)),
        lambda o: ([o], {"scheduler": ExponentialLR(o, 1.0), "frequency": 2}),
        lambda o: [{"optimizer": o, "lr_scheduler": {"scheduler": ExponentialLR(o, 1.0), "strict": False}}],
    ],
)
def test_every_form_that_lightning_takes(make):
    found = configure_optimizers(Scheduled(make))
    assert type(found.optimizer) is SGD
    assert len(found.schedulers) <= 1


def test_a_schedule_of_epochs_is_said_to_be_one_of_local_epochs(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(optimizers, "rank_zero_info", said.append)
    model = Regression()
    for interval in ("epoch", "round"):
        optimizer = SGD(model.parameters(), lr=0.1)
        config = {"scheduler": ExponentialLR(optimizer, 0.9), "interval": interval}
        model.configure_optimizers = lambda o=optimizer, c=config: {"optimizer": o, "lr_scheduler": c}
        RoundSchedule(model)
    assert len(said) == 1
    assert "ExponentialLR counts the local epochs of a client's round" in said[0]


class TwoPasses(SGD):
    """As an optimizer that does SAM by itself."""

    def step(self, closure):
        closure()


def test_an_optimizer_that_needs_a_closure_is_refused(tmp_path):
    model = Regression()
    model.configure_optimizers = lambda: TwoPasses(model.parameters(), lr=0.1)
    with pytest.raises(
        MisconfigurationException, match=r"TwoPasses.step\(\) is called without .* trainer.perturbation"
    ):
        quiet_trainer(tmp_path).fit(model, Clients())


class Modes(torch.optim.SGD):
    """As optimizers without a schedule, which train at one point and are evaluated at another."""

    def train(self):
        pass

    eval = train


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o: [o, o], "returned 2 optimizers; federated training needs exactly one"),
        (lambda o: None, "returned 0 optimizers"),
        (lambda o: ({"optimizer": o}, {"optimizer": o}), "returned 2 optimizers"),
        (lambda o: 3, "returned 3, which is not understood"),
        (lambda o: SGD([torch.nn.Parameter(torch.ones(2))]), "SGD has parameters that are not the module's, and no"),
        (lambda o: torch.optim.SGD(o.param_groups, lr=-1.0), "model.configure_optimizers: Invalid learning rate: -1.0"),
        (lambda o: torch.optim.LBFGS([o.param_groups[0]["params"][0]]), "LBFGS evaluates its own closure"),
        (
            lambda o: Modes(o.param_groups, lr=0.1),
            r"Modes has other weights in training than in evaluation \(train\(\)",
        ),
        (lambda o: torch.optim.SparseAdam(o.param_groups), "SparseAdam takes no gradients but sparse ones"),
        (
            lambda o: ([o], [{"scheduler": ExponentialLR(o, 1.0), "interval": "month"}]),
            "interval 'month' must be one of",
        ),
        (lambda o: {"optimizer": o, "lr_scheduler": {}}, "dictionary .* needs the key 'scheduler'"),
        (lambda o: {"optimizer": o, "lr_scheduler": ExponentialLR}, "ExponentialLR'> is no scheduler; make one of it"),
        (lambda o: ([o], [lambda epoch: 0.5]), "<lambda> at .* is no scheduler"),
        (lambda o: ([o], [ExponentialLR(SGD(o.param_groups[0]["params"], lr=1.0), 1.0)]), "that was not returned"),
    ],
)
def test_what_is_not_understood_is_refused_before_training(tmp_path, make, message):
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(tmp_path).fit(Scheduled(make), Clients())
    assert not list(tmp_path.glob("default/*"))


def test_keys_that_mean_nothing_are_named(tmp_path):
    model = Scheduled(lambda o: ([o], [{"scheduler": ExponentialLR(o, 1.0), "every": 3}]))
    with pytest.warns(UserWarning, match=r"lr_scheduler keys \['every'\] mean nothing"):
        quiet_trainer(tmp_path).fit(model, Clients())
    with (
        pytest.warns(RuntimeWarning, match="'optim'"),
        pytest.raises(MisconfigurationException, match="not understood"),
    ):
        configure_optimizers(Scheduled(lambda o: {"optim": o}))


CALLS = []


class WarmUp(Regression):
    """The commonest reason to override ``optimizer_step``: the learning rate grows over the first steps."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        CALLS.append((epoch, batch_idx))  # an attribute of the module would be put back after each client
        for group in optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.trainer.global_step + 1) / 4)
        optimizer.step(closure=optimizer_closure)


class ByHand(Regression):
    """The same with hooks."""

    def on_before_optimizer_step(self, optimizer):
        optimizer.param_groups[0]["lr"] = self.lr * min(1.0, (self.trainer.global_step + 1) / 4)


@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}, {"sam": True}])
def test_an_own_optimizer_step_is_honoured(tmp_path, settings):
    from fedlight.perturbations import SAM

    more = {"perturbation": SAM(0.1)} if settings == {"sam": True} else settings
    CALLS.clear()
    found, expected = WarmUp(), ByHand()
    for model in (found, expected):
        trainer = quiet_trainer(tmp_path, clients_per_round=1.0, max_rounds=2, **more)
        trainer.fit(model, Clients())
    assert torch.equal(weights(found), weights(expected))
    assert not torch.equal(weights(found), weights(Regression()))
    assert len(CALLS) == trainer.global_step


def test_the_rates_of_an_own_optimizer_step_are_those_that_algorithms_divide_by(tmp_path):
    keep = Keep()
    CALLS.clear()
    model = WarmUp()
    quiet_trainer(tmp_path, algorithm=keep, max_rounds=2, clients_per_round=1.0).fit(model, Clients(sizes=(8, 12)))
    found = [r.lr_sum for results in keep.rounds for r in results]
    assert found == pytest.approx([0.025 + 0.05, 0.025 + 0.05 + 0.075, 0.2, 0.3])
    assert CALLS == [(0, 0), (0, 1), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 0), (1, 1), (1, 2)]


def test_the_base_classes_optimizer_step_is_the_default(tmp_path):
    class Own(Regression):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            optimizer.zero_grad()

    found, expected = Own(), Regression()
    for model in (found, expected):
        quiet_trainer(tmp_path).fit(model, Clients())
    assert torch.equal(weights(found), weights(expected))


@pytest.mark.parametrize(
    ("step", "found"),
    [
        (lambda self, e, i, o, closure: None, "took 0 steps and 0 gradients"),
        (lambda self, e, i, o, closure: closure() and None, "took 0 steps and 1 gradients"),
        (lambda self, e, i, o, closure: [o.step(closure) for _ in "ab"], "took 2 steps and 2 gradients"),
        (lambda self, e, i, o, closure: o.step(), "took 1 steps and 0 gradients"),
    ],
)
def test_an_own_optimizer_step_without_the_closure_is_refused(tmp_path, step, found):
    model = type("Model", (Regression,), {"optimizer_step": step})()
    with pytest.raises(MisconfigurationException, match=f"Model.optimizer_step must call optimizer.step.*{found}"):
        quiet_trainer(tmp_path).fit(model, Clients())


def test_recorded_engines_refuse_an_own_optimizer_step(tmp_path):
    with pytest.raises(MisconfigurationException, match="engine=vmap: WarmUp overrides optimizer_step"):
        quiet_trainer(tmp_path, engine="vmap").fit(WarmUp(), Clients())


def test_a_module_does_not_step_the_optimizer_of_the_trainer(tmp_path):
    class Steps(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            self.optimizers().step()

    with pytest.raises(MisconfigurationException, match=r"Steps calls step of self.optimizers\(\)"):
        quiet_trainer(tmp_path).fit(Steps(), Clients())


def test_any_optimizer_of_torch_trains_as_by_hand(tmp_path):
    from fedlight.seeding import generator

    data = Clients(sizes=(8,))
    for make in (torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam):

        class Model(Regression):
            def configure_optimizers(self, make=make):
                return make(self.parameters(), lr=0.01, weight_decay=0.1)

        found, expected = Model(), Model()
        quiet_trainer(tmp_path, max_rounds=1, clients_per_round=1, local_epochs=2).fit(found, data)
        optimizer, rng = expected.configure_optimizers(), generator(0, "order", 0, 0)
        for _ in range(2):
            for rows in torch.randperm(8, generator=rng).split(4):
                optimizer.zero_grad()
                expected.training_step(data.client_dataset(0).batch(rows), 0).backward()
                optimizer.step()
        torch.testing.assert_close(weights(found), weights(expected), rtol=0, atol=1e-7)


class Around(torch.optim.Optimizer):
    """An optimizer around another, as Lookahead, which does not begin as torch's do."""

    def __init__(self, inner):
        self.inner, self.param_groups, self.state, self.defaults = inner, inner.param_groups, inner.state, {}

    def step(self, closure=None):
        return self.inner.step(closure)


def test_an_optimizer_around_another_trains_as_that(tmp_path):
    found, expected = Scheduled(Around), Scheduled(lambda o: o)
    for model in (found, expected):
        quiet_trainer(tmp_path, max_rounds=1).fit(model, Clients())
    assert torch.equal(weights(found), weights(expected))


def test_momentum_is_not_carried_over(tmp_path):
    class Momentum(Regression):
        def configure_optimizers(self):
            return SGD(self.parameters(), lr=0.1, momentum=0.9)

    data, found, expected = Clients(sizes=(4,)), Momentum(), Regression()
    quiet_trainer(tmp_path, clients_per_round=1, max_rounds=3).fit(found, data)
    quiet_trainer(tmp_path, clients_per_round=1, max_rounds=3).fit(expected, data)  # single steps: momentum is idle
    assert torch.equal(weights(found), weights(expected))
    assert math.isfinite(weights(found).sum())


@pytest.mark.parametrize(
    ("frozen", "said"), [(False, ["net.0.weight, net.0.bias, net.1.weight and 1 more"]), (True, [])]
)
def test_parameters_that_the_optimizer_does_not_have_are_said(tmp_path, caplog, frozen, said):
    model = Regression(net=torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)))
    model.net[:2].requires_grad_(not frozen)
    model.configure_optimizers = lambda: SGD(model.net[2].parameters(), lr=0.1)
    quiet_trainer(tmp_path, max_rounds=1).fit(model, Clients())
    found = [m.split("no client trains ")[1] for m in caplog.messages if "no client trains" in m]
    assert found == [f"{some}, which the optimizer does not have." for some in said]

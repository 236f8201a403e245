"""Where one method must equal another."""

import inspect
from functools import partial

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight import algorithms
from fedlight.algorithms import SCAFFOLD as Scaffold
from fedlight.algorithms import (
    FedAdagrad,
    FedAdam,
    FedASAM,
    FedAvg,
    FedAvgM,
    FedCM,
    FedDC,
    FedDyn,
    FedGAMMA,
    FedGloSS,
    FedLESAM,
    FedLESAM_D,
    FedLESAM_S,
    FedNova,
    FedOpt,
    FedProx,
    FedSAM,
    FedSMOO,
    FedSpeed,
    FedYogi,
    MoFedSAM,
)
from fedlight.perturbations import ASAM, LESAM, SAM, DualSAM
from tests.algorithms.driver import Driver, linear_layout
from tests.algorithms.twins import Problem


def equal_sizes():
    return Problem(sizes=(30, 30, 30))


def assert_same(one, other, atol=1e-12):
    np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def test_fedprox_without_its_term_is_fedavg():
    assert_same(Driver(FedProx(mu=0)).run(), Driver(FedAvg()).run(), atol=0)


def test_scaffold_with_zero_controls_is_fedavg():
    class WithoutControls(Scaffold):
        def client_update(self, server, client, result):
            return client, {"params": result.params, "control_change": torch.zeros_like(result.params)}

    problem = equal_sizes()
    assert_same(Driver(WithoutControls(), problem).run(), Driver(FedAvg(), problem).run())


def test_feddc_with_zero_gradients_is_feddyn():
    class WithoutGradients(FedDC):
        def client_update(self, server, client, result):
            state, _ = super().client_update(server, client, result)
            zero = torch.zeros_like(result.params)
            return {**state, "gradient": zero}, {"params": result.params, "gradient_change": zero}

    assert_same(Driver(WithoutGradients(0.2)).run(), Driver(FedDyn(0.2)).run(), atol=0)


def test_feddyn_before_any_update_is_fedprox_with_a_doubled_step():
    """In the first round h is zero, and with everyone there the mean of h is the mean update once more."""
    problem = Problem(sizes=(30, 30, 30), rounds=((0, 1, 2),), lrs=(0.1,))
    prox = Driver(FedProx(0.2, server_lr=2.0), problem).run()
    assert_same(Driver(FedDyn(0.2), problem).run(), prox)


def test_fedcm_without_momentum_is_fedavg_with_a_plain_mean():
    problem = equal_sizes()
    assert_same(Driver(FedCM(alpha=1.0, server_lr=0.7), problem).run(), Driver(FedAvg(0.7), problem).run())


def test_fednova_with_equal_steps_is_fedavg():
    problem = Problem(steps=(3, 3, 3))
    assert_same(Driver(FedNova(0.7), problem).run(), Driver(FedAvg(0.7), problem).run())


@pytest.mark.parametrize("server_lr", [1.0, 0.7])
def test_fedavgm_without_momentum_is_fedavg(server_lr):
    """With clients of unequal size, too."""
    assert_same(Driver(FedAvgM(server_lr, momentum=0.0)).run(), Driver(FedAvg(server_lr)).run())
    assert_same(Driver(FedOpt(partial(torch.optim.SGD, lr=server_lr))).run(), Driver(FedAvg(server_lr)).run())


def test_fedavgm_with_a_plain_mean_and_no_momentum_is_fedcm_without_momentum():
    assert_same(Driver(FedAvgM(0.7, 0.0, weighted=False)).run(), Driver(FedCM(alpha=1.0, server_lr=0.7)).run())


def first_step(algorithm, update):
    """How far the server moves in its first round, for a mean update [P]."""
    start = torch.zeros(len(update), dtype=torch.float64)
    total = {"update": 3 * torch.tensor(update, dtype=torch.float64), "weight": torch.tensor(3.0), "clients": 1}
    return algorithm.aggregate(algorithm.init_server(start), total)["params"]


@pytest.mark.parametrize("start", [0.0, 0.25])
def test_the_first_step_of_the_adaptive_methods_by_hand(start):
    """Δ = 2: m = 0.1·2, v = start ± 0.01·4 (Yogi), 0.99·start + 0.01·4 (Adam), start + 4 (Adagrad); τ = 0.1."""
    common = {"server_lr": 1.0, "eps": 0.1, "initial_accumulator": start}
    for method, m, v in ((FedYogi, 0.2, start + 0.04), (FedAdam, 0.2, 0.99 * start + 0.04), (FedAdagrad, 2, start + 4)):
        expected = torch.tensor([m / (v**0.5 + 0.1)], dtype=torch.float64)
        torch.testing.assert_close(first_step(method(**common), [2.0]), expected, rtol=0, atol=1e-12)
    # Where v is larger than Δ², Yogi's moves down by (1 − β₂)·Δ².
    step = first_step(FedYogi(1.0, eps=0.1, initial_accumulator=9.0), [2.0])
    torch.testing.assert_close(step, torch.tensor([0.2 / (8.96**0.5 + 0.1)], dtype=torch.float64), rtol=0, atol=1e-12)


def test_fedadam_with_bias_correction_is_adam_of_torch():
    corrected = FedAdam(0.05, 0.8, 0.95, 0.01, bias_correction=True)
    torchs = FedOpt(partial(torch.optim.Adam, lr=0.05, betas=(0.8, 0.95), eps=0.01))
    assert_same(Driver(corrected).run(), Driver(torchs).run())
    with pytest.raises(ValueError, match=r"algorithm\.bias_correction presumes .*found initial_accumulator=0\.1\."):
        FedAdam(bias_correction=True, initial_accumulator=0.1)


# The twins of FedAdamW and FedMuon, whose steps are an optimizer's, have plain means.
WEIGHTED = {name: "samples" for name in algorithms.__all__ if name not in ("Message", "FedAdamW", "FedMuon")}
WEIGHTED |= dict.fromkeys(("SCAFFOLD", "FedGAMMA", "FedLESAM_S", "FedCM", "MoFedSAM"), "equal")
WEIGHTED |= dict.fromkeys(("FedDyn", "FedDC", "FedSpeed", "FedSMOO", "FedLESAM_D"), "equal")
WEIGHTED |= dict.fromkeys(("FedACG", "FedExP", "FedVARP", "FedInit", "FedNSAM"), "equal")
WEIGHTED |= dict.fromkeys(("FedSWA", "FedMoSWA", "FedTOGA", "FedWMSAM"), "equal")


@pytest.mark.parametrize("name", WEIGHTED)
def test_the_selected_clients_are_weighted_as_the_methods_own_mean_is(name):
    """By samples, n = 10, 25, 55, or equally; and where the server's model is that mean, they are the same bits."""
    driver = Driver(getattr(algorithms, name)(), Problem(rounds=((0, 1, 2),), lrs=(0.1,)))
    received, own = driver.algorithm.broadcast(driver.server), driver.algorithm.init_client(driver.server["params"])
    if driver.perturbation is not None:
        received = {**received, **driver.perturbation.broadcast(driver.server_perturbation)}
    before = {i: driver.local(i, received, own, 0.1).params for i in range(3)}
    driver.run()
    n = torch.tensor((10.0, 25.0, 55.0) if WEIGHTED[name] == "samples" else (1.0, 1.0, 1.0), dtype=torch.float64)
    mean = sum(k * before[i] for i, k in enumerate(n / n.sum()))
    torch.testing.assert_close(driver.evaluated["selected"], mean, rtol=0, atol=1e-12)
    by_definition = (
        "FedAvg",
        "FedProx",
        "FedSAM",
        "FedASAM",
        "FedLESAM",
        "SCAFFOLD",
        "FedGAMMA",
        "FedLESAM_S",
        "FedCM",
        "FedInit",
        "FedWMSAM",
    )
    if name in (*by_definition, "Algorithm", "MoFedSAM"):
        assert torch.equal(driver.evaluated["server"], driver.evaluated["selected"])


EQUAL = [n for n in WEIGHTED if "weighting" in inspect.signature(getattr(algorithms, n)).parameters]


@pytest.mark.parametrize("name", EQUAL)
def test_equal_weighting_forgets_the_sizes_of_clients(name):
    """Where all clients are of one size both weightings are the same; otherwise only ``equal`` does not see it."""
    method, sizes = getattr(algorithms, name), ((1, 9, 80), (30, 30, 30))
    unequal, alike = (Driver(method(weighting="equal"), Problem(sizes=s)).run() for s in sizes)
    assert_same(unequal, alike, atol=0)
    assert_same(alike, Driver(method(), Problem(sizes=sizes[1])).run(), atol=0)
    assert np.abs(np.subtract(unequal, Driver(method(), Problem(sizes=sizes[0])).run())).max() > 1e-4
    with pytest.raises(ValueError, match=r"algorithm\.weighting must be 'samples' or 'equal', found 'sample'\."):
        Driver(method(weighting="sample"))


def test_fedgloss_without_perturbation_is_feddyn_with_its_weight_inverted():
    problem = equal_sizes()
    assert_same(Driver(FedGloSS(rho=0, beta=5.0), problem).run(), Driver(FedDyn(alpha=0.2), problem).run())


def test_one_client_with_all_data_is_centralised_training():
    problem = Problem(sizes=(30,), rounds=((0,), (0,)), lrs=(0.1, 0.1), steps=(5,))
    w = problem.start
    for _ in range(10):
        w = w - 0.1 * problem.gradient(0, w)
    for algorithm in (FedAvg(), FedProx(0), FedNova(), FedCM(1.0), FedAvgM(1.0, 0.0), Scaffold()):
        assert_same(Driver(algorithm, problem).run()[-1], w)


SHORTHANDS = {
    "FedSAM": (lambda: FedSAM(0.1, 0.7), lambda: FedAvg(0.7), lambda: SAM(0.1)),
    "FedASAM": (lambda: FedASAM(0.4, 0.3, 0.7), lambda: FedAvg(0.7), lambda: ASAM(0.4, 0.3)),
    "FedLESAM": (lambda: FedLESAM(0.1, 0.7), lambda: FedAvg(0.7), lambda: LESAM(0.1)),
    "FedLESAM_S": (lambda: FedLESAM_S(0.1, 0.7), lambda: Scaffold(0.7), lambda: LESAM(0.1)),
    "FedLESAM_D": (lambda: FedLESAM_D(0.1, 0.3), lambda: FedDyn(0.3), lambda: LESAM(0.1)),
    "FedSpeed": (lambda: FedSpeed(0.1, 0.3), lambda: FedDyn(0.3), lambda: SAM(0.1)),
    "FedSMOO": (lambda: FedSMOO(0.1, 0.3), lambda: FedDyn(0.3), lambda: DualSAM(0.1)),
    "FedGAMMA": (lambda: FedGAMMA(0.1, 0.7), lambda: Scaffold(0.7), lambda: SAM(0.1)),
    "MoFedSAM": (lambda: MoFedSAM(0.1, 0.3, 0.7), lambda: FedCM(0.3, 0.7), lambda: SAM(0.1)),
}


def test_every_method_with_a_perturbation_of_its_own_is_a_shorthand():
    own = {name for name in algorithms.__all__ if name != "Message" and getattr(algorithms, name)().perturbation}
    assert own == set(SHORTHANDS) | {"FedNSAM", "FedTOGA", "FedWMSAM"}  # which are more than that


@pytest.mark.parametrize("name", SHORTHANDS)
def test_shorthands_equal_their_parts(name):
    shorthand, algorithm, perturbation = SHORTHANDS[name]
    parts = Driver(algorithm(), perturbation=perturbation())
    assert_same(Driver(shorthand()).run(), parts.run(), atol=0)


@pytest.mark.parametrize("name", SHORTHANDS)
def test_a_radius_of_zero_is_no_perturbation(name):
    shorthand, algorithm, _ = SHORTHANDS[name]
    method = shorthand()
    method.perturbation = type(method.perturbation)(rho=0)
    assert_same(Driver(method).run(), Driver(algorithm()).run(), atol=0)
    assert not method.perturbation.needs_gradient


@pytest.mark.parametrize("method", [FedCM(0.3), FedDC(0.3), Scaffold()])
def test_a_round_with_a_learning_rate_of_zero_stays_finite(method):
    problem = Problem(lrs=(0.1, 0.0, 0.1))
    models = Driver(method, problem).run()
    assert np.isfinite(models).all()


@pytest.mark.parametrize("method", [FedAvgM(), FedAdam(), FedYogi(), FedAdagrad()])
def test_the_server_optimizer_continues_from_its_state_alone(method):
    """All that the optimizer remembers lies in the server's state, as tensors: a checkpoint of it is complete."""
    problem = Problem()
    whole = Driver(method, problem).run()
    driver = Driver(type(method)(), problem)
    for t, (selected, lr) in enumerate(zip(problem.rounds, problem.lrs, strict=True)):
        params = driver.round(selected, lr)
        assert_same(params.numpy(), whole[t], atol=0)
        driver.algorithm = type(method)()
        driver.algorithm.setup(3, linear_layout())
        driver.server = {name: value.clone() for name, value in driver.server.items()}
    assert all(isinstance(value, torch.Tensor) for value in driver.server.values())
    assert set(driver.server) == set(method.init_server(torch.ones(4)))  # the same entries from the start
    assert int(driver.server["steps"]) == 3


@pytest.mark.parametrize("name", ["RMSprop", "NAdam", "Adamax", "ASGD", "Rprop", "RAdam", "AdamW"])
def test_fedopt_takes_any_optimizer_of_torch(name):
    """Against the optimizer itself, fed with the same pseudo-gradients."""
    make = partial(getattr(torch.optim, name), lr=0.01)
    driver = Driver(FedOpt(make))
    twin = torch.nn.Parameter(torch.tensor(driver.problem.start))
    optimizer = make([twin])
    for selected, lr in zip(driver.problem.rounds, driver.problem.lrs, strict=True):
        received = driver.algorithm.broadcast(driver.server)
        results = [driver.local(i, received, {}, lr) for i in selected]
        n = torch.tensor([float(r.num_samples) for r in results], dtype=torch.float64)
        twin.grad = -(n / n.sum()) @ torch.stack([r.update for r in results])
        optimizer.step()
        torch.testing.assert_close(driver.round(selected, lr), twin.detach(), rtol=0, atol=1e-10)


def test_fedopt_refuses_an_optimizer_that_wants_a_closure():
    with pytest.raises(MisconfigurationException, match=r"algorithm\.optimizer: LBFGS evaluates a closure"):
        Driver(FedOpt(torch.optim.LBFGS))


class Counting(torch.optim.SGD):
    """Counts its steps in its group or, as torch's once did, as an integer of a parameter's state."""

    def __init__(self, params, where):
        super().__init__(params, lr=1.0)
        self.where = where
        self.param_groups[0]["count"] = 0

    def step(self, closure=None):
        group = self.param_groups[0]
        kept = group if self.where == "group" else self.state[group["params"][0]]
        kept["count"] = kept.get("count", 0) + 1
        super().step()


@pytest.mark.parametrize("where", ["group", "state"])
def test_fedopt_refuses_an_optimizer_that_would_count_from_0_in_every_round(where):
    with pytest.raises(MisconfigurationException, match=r"algorithm\.optimizer: Counting keeps count as Python has it"):
        Driver(FedOpt(partial(Counting, where=where)))
    with pytest.raises(MisconfigurationException, match=r"algorithm\.optimizer: Nesterov momentum requires"):
        Driver(FedAvgM(momentum=0.0, nesterov=True))


def test_clients_that_were_not_sampled_have_no_state():
    problem = Problem(sizes=(10,) * 1000, rounds=((3, 997), (3,)), lrs=(0.1, 0.1), steps=(2,) * 1000)
    driver = Driver(FedDC(), problem)
    driver.run()
    assert set(driver.clients) == {3, 997}
    torch.testing.assert_close(
        driver.server["h_mean"], (driver.clients[3]["h"] + driver.clients[997]["h"]) / 1000, rtol=0, atol=1e-15
    )

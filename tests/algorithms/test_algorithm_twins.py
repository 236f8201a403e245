"""Every algorithm against its twin: three rounds, three unequal clients, partial participation, in float64."""

import inspect
from functools import partial

import numpy as np
import pytest
import torch

from fedlight import algorithms
from tests.algorithms import newer_twins as newer
from tests.algorithms import twins
from tests.algorithms.cases import CASES, NETWORKS, PERTURBATIONS, SETTINGS
from tests.algorithms.driver import Driver
from tests.algorithms.fitted import fit, longer
from tests.algorithms.twins import Problem

DRIVEN = [name for name in CASES if name != "FedBN"]
"""What clients keep of the model is not the algorithm's: FedBN is played by the whole of fedlight."""


def test_every_algorithm_has_a_twin():
    assert {*CASES, *NETWORKS} == set(algorithms.__all__) - {"Message"}


def test_every_weighting_has_a_twin():
    """All settings that change a mean or a correction are there."""
    flags = {
        n
        for n in CASES
        for key in ("weighted", "weighting")
        if key in inspect.signature(getattr(algorithms, n)).parameters
    }
    assert flags == {name.split(",")[0] for name in SETTINGS if not {"momentum", "below"} & {*name.split()}}


@pytest.mark.parametrize("name", [*DRIVEN, *SETTINGS])
def test_three_rounds_equal_those_of_the_twin(name):
    make, twin = {**CASES, **SETTINGS}[name]
    problem = Problem()
    models = Driver(make(), problem).run()
    np.testing.assert_allclose(models, twin(problem), rtol=0, atol=1e-10)


def test_fedbn_equals_its_twin():
    make, twin = CASES["FedBN"]
    np.testing.assert_allclose(fit(longer(), make()), twin(longer()), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", DRIVEN)
def test_default_settings_stay_finite_and_approach_the_optimum(name):
    problem = Problem(rounds=((0, 1, 2),) * 20, lrs=(0.1,) * 20)
    algorithm = getattr(algorithms, name)()
    last = Driver(algorithm, problem).run()[-1]
    total = sum(n * h for n, h in zip(problem.sizes, problem.hessians, strict=True))
    right = sum(n * h @ b for n, h, b in zip(problem.sizes, problem.hessians, problem.centers, strict=True))
    optimum = np.linalg.solve(total, right)
    assert np.linalg.norm(last - optimum) < 0.9 * np.linalg.norm(problem.start - optimum)


COMBINED = {
    "SCAFFOLD": (lambda: algorithms.SCAFFOLD(), twins.scaffold),
    "FedDC": (lambda: algorithms.FedDC(0.3), partial(twins.feddc, alpha=0.3)),
    "FedCM": (lambda: algorithms.FedCM(0.3), partial(twins.fedcm, alpha=0.3)),
    "FedGloSS": (lambda: algorithms.FedGloSS(0.1, 5.0), partial(twins.fedgloss, rho=0.1, beta=5.0)),
    "FedInit": (lambda: algorithms.FedInit(0.3), partial(newer.fedinit, beta=0.3)),
    "FedMoSWA": (lambda: algorithms.FedMoSWA(0.2, 0.4), partial(newer.fedmoswa, rho=0.2, alpha=1.5, gamma=0.4)),
}


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("name", COMBINED)
def test_algorithms_combine_with_perturbations(name, perturbation):
    problem = Problem()
    (make, twin), (make_perturbation, oracle) = COMBINED[name], PERTURBATIONS[perturbation]
    models = Driver(make(), problem, make_perturbation()).run()
    np.testing.assert_allclose(models, twin(problem, oracle(problem)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", DRIVEN)
def test_the_states_that_go_in_are_not_changed(name):
    """States are values: what a method was handed is the same afterwards."""
    driver = Driver(CASES[name][0]())
    driver.run()
    server = {k: v.clone() for k, v in driver.server.items()}
    clients = {i: {k: v.clone() for k, v in s.items()} for i, s in driver.clients.items()}
    before, before_clients = driver.server, dict(driver.clients)
    driver.round((0, 1), 0.05)
    assert all(torch.equal(before[k], server[k]) for k in server)
    assert all(torch.equal(before_clients[i][k], clients[i][k]) for i in clients for k in clients[i])

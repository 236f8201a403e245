"""Every algorithm against its twin: three rounds, three unequal clients, partial participation, in float64."""

import inspect
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fedlight import algorithms
from fedlight.module.parameters import ParameterLayout
from fedlight.perturbations import ASAM, LESAM, SAM, DualSAM
from tests.algorithms import newer_twins as newer
from tests.algorithms import twins
from tests.algorithms.driver import Driver
from tests.algorithms.twins import Asam, Dual, Lesam, Plain, Problem, Sam

CASES = {
    "Algorithm": (lambda: algorithms.Algorithm(), lambda p: twins.fedavg(p, Plain(p))),
    "FedAvg": (lambda: algorithms.FedAvg(0.7), lambda p: twins.fedavg(p, Plain(p), 0.7)),
    "FedProx": (lambda: algorithms.FedProx(0.3, 0.7), lambda p: twins.fedavg(p, Plain(p), 0.7, mu=0.3)),
    "SCAFFOLD": (lambda: algorithms.SCAFFOLD(0.7), lambda p: twins.scaffold(p, Plain(p), 0.7)),
    "FedDyn": (lambda: algorithms.FedDyn(0.3), lambda p: twins.feddyn(p, Plain(p), 0.3)),
    "FedDC": (lambda: algorithms.FedDC(0.3), lambda p: twins.feddc(p, Plain(p), 0.3)),
    "FedCM": (lambda: algorithms.FedCM(0.3, 0.7), lambda p: twins.fedcm(p, Plain(p), 0.3, 0.7)),
    "FedSpeed": (lambda: algorithms.FedSpeed(0.1, 0.3), lambda p: twins.feddyn(p, Sam(p, 0.1), 0.3)),
    "FedOpt": (
        lambda: algorithms.FedOpt(partial(torch.optim.RMSprop, lr=0.05, alpha=0.9, eps=1e-3)),
        lambda p: twins.fedopt(p, Plain(p), twins.rmsprop(0.05, 0.9, 1e-3)),
    ),
    "FedAvgM": (
        lambda: algorithms.FedAvgM(0.7, 0.9),
        lambda p: twins.fedopt(p, Plain(p), twins.sgd_momentum(0.7, 0.9)),
    ),
    "FedAdam": (
        lambda: algorithms.FedAdam(0.05, 0.8, 0.95, 0.01, 1e-4),
        lambda p: twins.fedopt(p, Plain(p), twins.adam(0.05, 0.8, 0.95, 0.01, 1e-4)),
    ),
    "FedYogi": (
        lambda: algorithms.FedYogi(0.05, 0.8, 0.95, 0.01, 1e-4),
        lambda p: twins.fedopt(p, Plain(p), twins.yogi(0.05, 0.8, 0.95, 0.01, 1e-4)),
    ),
    "FedAdagrad": (
        lambda: algorithms.FedAdagrad(0.05, 0.01, 1e-4),
        lambda p: twins.fedopt(p, Plain(p), twins.adagrad(0.05, 0.01, 1e-4)),
    ),
    "FedNova": (lambda: algorithms.FedNova(0.7), lambda p: twins.fednova(p, Plain(p), 0.7)),
    "FedBN": (lambda: algorithms.FedBN(0.7), lambda p: twins.fedbn(p, Plain(p), [2, 3], 0.7)),
    "FedGAMMA": (lambda: algorithms.FedGAMMA(0.1, 0.7), lambda p: twins.scaffold(p, Sam(p, 0.1), 0.7)),
    "FedSMOO": (lambda: algorithms.FedSMOO(0.1, 0.3), lambda p: twins.feddyn(p, Dual(p, 0.1), 0.3)),
    "MoFedSAM": (lambda: algorithms.MoFedSAM(0.1, 0.3, 0.7), lambda p: twins.fedcm(p, Sam(p, 0.1), 0.3, 0.7)),
    "FedGloSS": (lambda: algorithms.FedGloSS(0.1, 5.0, 0.7), lambda p: twins.fedgloss(p, Plain(p), 0.1, 5.0, 0.7)),
    "FedSAM": (lambda: algorithms.FedSAM(0.1, 0.7), lambda p: twins.fedavg(p, Sam(p, 0.1), 0.7)),
    "FedASAM": (lambda: algorithms.FedASAM(0.4, 0.3, 0.7), lambda p: twins.fedavg(p, Asam(p, 0.4, 0.3), 0.7)),
    "FedLESAM": (lambda: algorithms.FedLESAM(0.1, 0.7), lambda p: twins.fedavg(p, Lesam(p, 0.1), 0.7)),
    "FedLESAM_S": (lambda: algorithms.FedLESAM_S(0.1, 0.7), lambda p: twins.scaffold(p, Lesam(p, 0.1), 0.7)),
    "FedLESAM_D": (lambda: algorithms.FedLESAM_D(0.1, 0.3), lambda p: twins.feddyn(p, Lesam(p, 0.1), 0.3)),
    "FedACG": (lambda: algorithms.FedACG(0.6, 0.3), lambda p: newer.fedacg(p, Plain(p), 0.6, 0.3)),
    "FedExP": (lambda: algorithms.FedExP(1e-4), lambda p: newer.fedexp(p, Plain(p), 1e-4)),
    "FedVARP": (lambda: algorithms.FedVARP(0.7), lambda p: newer.fedvarp(p, Plain(p), 0.7)),
    "FedInit": (lambda: algorithms.FedInit(0.3), lambda p: newer.fedinit(p, Plain(p), 0.3)),
    "FedNSAM": (lambda: algorithms.FedNSAM(0.1, 0.6), lambda p: newer.fedacg(p, Sam(p, 0.1), 0.6, 0.0)),
    "FedSWA": (lambda: algorithms.FedSWA(0.2, 1.3), lambda p: newer.fedswa(p, Plain(p), 0.2, 1.3)),
    "FedMoSWA": (lambda: algorithms.FedMoSWA(0.2, 0.4, 1.3), lambda p: newer.fedmoswa(p, Plain(p), 0.2, 1.3, 0.4)),
    "FedTOGA": (lambda: algorithms.FedTOGA(0.1, 0.3, 0.7, 0.5), lambda p: newer.fedtoga(p, 0.1, 0.3, 0.7, 0.5)),
    "FedWMSAM": (
        lambda: algorithms.FedWMSAM(0.1, 0.3, 0.4, 0.7),
        lambda p: newer.fedwmsam(p, 0.1, 0.3, 0.4, 0.7),
    ),
}


SETTINGS = {
    "FedOpt, plain mean": (
        lambda: algorithms.FedOpt(partial(torch.optim.RMSprop, lr=0.05, alpha=0.9, eps=1e-3), weighted=False),
        lambda p: twins.fedopt(p, Plain(p), twins.rmsprop(0.05, 0.9, 1e-3), weighted=False),
    ),
    "FedAvgM, plain mean": (
        lambda: algorithms.FedAvgM(0.7, 0.9, weighted=False),
        lambda p: twins.fedopt(p, Plain(p), twins.sgd_momentum(0.7, 0.9), weighted=False),
    ),
    "FedAvgM, Nesterov": (
        lambda: algorithms.FedAvgM(0.7, 0.9, nesterov=True),
        lambda p: twins.fedopt(p, Plain(p), twins.sgd_momentum(0.7, 0.9, nesterov=True)),
    ),
    "FedAdam, plain mean": (
        lambda: algorithms.FedAdam(0.05, 0.8, 0.95, 0.01, weighted=False),
        lambda p: twins.fedopt(p, Plain(p), twins.adam(0.05, 0.8, 0.95, 0.01), weighted=False),
    ),
    "FedAdam, bias corrected": (
        lambda: algorithms.FedAdam(0.05, 0.8, 0.95, 0.01, bias_correction=True),
        lambda p: twins.fedopt(p, Plain(p), twins.adam(0.05, 0.8, 0.95, 0.01, corrected=True)),
    ),
    "FedYogi, plain mean": (
        lambda: algorithms.FedYogi(0.05, 0.8, 0.95, 0.01, weighted=False),
        lambda p: twins.fedopt(p, Plain(p), twins.yogi(0.05, 0.8, 0.95, 0.01, 0.0), weighted=False),
    ),
    "FedAdagrad, plain mean": (
        lambda: algorithms.FedAdagrad(0.05, 0.01, weighted=False),
        lambda p: twins.fedopt(p, Plain(p), twins.adagrad(0.05, 0.01, 0.0), weighted=False),
    ),
    "SCAFFOLD, equal": (
        lambda: algorithms.SCAFFOLD(0.7, weighting="equal"),
        lambda p: twins.scaffold(p, Plain(p), 0.7, equal=True),
    ),
    "FedDyn, equal": (
        lambda: algorithms.FedDyn(0.3, weighting="equal"),
        lambda p: twins.feddyn(p, Plain(p), 0.3, equal=True),
    ),
    "FedDC, equal": (
        lambda: algorithms.FedDC(0.3, weighting="equal"),
        lambda p: twins.feddc(p, Plain(p), 0.3, equal=True),
    ),
    "FedSpeed, equal": (
        lambda: algorithms.FedSpeed(0.1, 0.3, weighting="equal"),
        lambda p: twins.feddyn(p, Sam(p, 0.1), 0.3, equal=True),
    ),
    "FedSMOO, equal": (
        lambda: algorithms.FedSMOO(0.1, 0.3, weighting="equal"),
        lambda p: twins.feddyn(p, Dual(p, 0.1), 0.3, equal=True),
    ),
    "FedGAMMA, equal": (
        lambda: algorithms.FedGAMMA(0.1, 0.7, weighting="equal"),
        lambda p: twins.scaffold(p, Sam(p, 0.1), 0.7, equal=True),
    ),
    "FedLESAM_S, equal": (
        lambda: algorithms.FedLESAM_S(0.1, 0.7, weighting="equal"),
        lambda p: twins.scaffold(p, Lesam(p, 0.1), 0.7, equal=True),
    ),
    "FedLESAM_D, equal": (
        lambda: algorithms.FedLESAM_D(0.1, 0.3, weighting="equal"),
        lambda p: twins.feddyn(p, Lesam(p, 0.1), 0.3, equal=True),
    ),
    "FedTOGA, equal": (
        lambda: algorithms.FedTOGA(0.1, 0.3, 0.7, 0.5, weighting="equal"),
        lambda p: newer.fedtoga(p, 0.1, 0.3, 0.7, 0.5, equal=True),
    ),
    "FedNSAM, along the momentum": (
        lambda: algorithms.FedNSAM(0.1, 0.6, along="momentum"),
        lambda p: newer.fednsam_along_momentum(p, 0.6),
    ),
}


def batch_norm_layout():
    """Four parameters, the last two of a BatchNorm layer."""
    return ParameterLayout.of(nn.Sequential(nn.Linear(2, 1, bias=False), nn.BatchNorm1d(1)).double())


def layout_for(name):
    return batch_norm_layout() if name == "FedBN" else None


def test_every_algorithm_has_a_twin():
    assert set(CASES) == set(algorithms.__all__) - {"Message"}


def test_every_weighting_has_a_twin():
    """All settings that change a mean or a correction are there."""
    flags = {
        n
        for n in CASES
        for key in ("weighted", "weighting")
        if key in inspect.signature(getattr(algorithms, n)).parameters
    }
    assert flags == {name.split(",")[0] for name in SETTINGS if "momentum" not in name}


@pytest.mark.parametrize("name", [*CASES, *SETTINGS])
def test_three_rounds_equal_those_of_the_twin(name):
    make, twin = {**CASES, **SETTINGS}[name]
    problem = Problem()
    models = Driver(make(), problem, layout=layout_for(name)).run()
    np.testing.assert_allclose(models, twin(problem), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_default_settings_stay_finite_and_approach_the_optimum(name):
    problem = Problem(rounds=((0, 1, 2),) * 20, lrs=(0.1,) * 20)
    algorithm = getattr(algorithms, name)()
    last = Driver(algorithm, problem, layout=layout_for(name)).run()[-1]
    total = sum(n * h for n, h in zip(problem.sizes, problem.hessians, strict=True))
    right = sum(n * h @ b for n, h, b in zip(problem.sizes, problem.hessians, problem.centers, strict=True))
    optimum = np.linalg.solve(total, right)
    entries = slice(0, 2) if name == "FedBN" else slice(None)
    if name == "FedBN":
        assert np.array_equal(last[2:], problem.start[2:])
        return
    assert np.linalg.norm((last - optimum)[entries]) < 0.9 * np.linalg.norm((problem.start - optimum)[entries])


PERTURBATIONS = {
    "SAM": (lambda: SAM(0.1), lambda p: Sam(p, 0.1)),
    "ASAM": (lambda: ASAM(0.4, 0.3), lambda p: Asam(p, 0.4, 0.3)),
    "LESAM": (lambda: LESAM(0.1), lambda p: Lesam(p, 0.1)),
    "DualSAM": (lambda: DualSAM(0.1), lambda p: Dual(p, 0.1)),
}
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


@pytest.mark.parametrize("name", CASES)
def test_the_states_that_go_in_are_not_changed(name):
    """States are values: what a method was handed is the same afterwards."""
    driver = Driver(CASES[name][0](), layout=layout_for(name))
    driver.run()
    server = {k: v.clone() for k, v in driver.server.items()}
    clients = {i: {k: v.clone() for k, v in s.items()} for i, s in driver.clients.items()}
    before, before_clients = driver.server, dict(driver.clients)
    driver.round((0, 1), 0.05)
    assert all(torch.equal(before[k], server[k]) for k in server)
    assert all(torch.equal(before_clients[i][k], clients[i][k]) for i in clients for k in clients[i])

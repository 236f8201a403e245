"""Settings of algorithms that make no sense are refused with the YAML key."""

import inspect
import math

import pytest

from fedlight import algorithms
from tests.algorithms.driver import Driver

NAMES = [name for name in algorithms.__all__ if name not in ("Message", "Algorithm")]


def numbers(cls):
    parameters = inspect.signature(cls).parameters.values()
    return [p.name for p in parameters if isinstance(p.default, float) and not isinstance(p.default, bool)]


SETTINGS = [(name, key) for name in NAMES for key in numbers(getattr(algorithms, name))]


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "much"])
@pytest.mark.parametrize(("name", "key"), SETTINGS)
def test_negative_and_unreal_settings_are_refused_by_key(name, key, value):
    with pytest.raises(ValueError, match=rf"algorithm\.{key} must be a finite number .*, found {value!r}\."):
        getattr(algorithms, name)(**{key: value})


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("FedDyn", "alpha", 0, "above 0"),
        ("FedCM", "alpha", 1.5, "above 0 and at most 1"),
        ("FedCM", "alpha", 0, "above 0 and at most 1"),
        ("FedAvgM", "momentum", 1, "at least 0 and below 1"),
        ("FedAdam", "beta2", 1.0, "at least 0 and below 1"),
        ("FedGloSS", "beta", 0, "above 0"),
        ("FedAvg", "server_lr", 0, "above 0"),
        ("FedACG", "momentum", 1, "at least 0 and below 1"),
        ("FedExP", "eps", 0, "above 0"),
        ("FedMoSWA", "gamma", 0, "above 0 and at most 1"),
        ("FedSWA", "rho", 1.1, "at least 0 and at most 1"),
        ("FedWMSAM", "alpha", 1, "above 0 and below 1"),
        ("FedMuon", "alpha", 1, "at least 0 and below 1"),
        ("MOON", "temperature", 0, "above 0"),
        ("FedNTD", "tau", 0, "above 0"),
    ],
)
def test_limits(name, key, value, message):
    with pytest.raises(ValueError, match=rf"algorithm\.{key} must be a finite number {message}, found {value!r}"):
        getattr(algorithms, name)(**{key: value})


def test_every_algorithm_has_settings_that_are_checked():
    assert len(SETTINGS) >= len(NAMES) - 1  # all but FedOpt, whose optimizer checks its own


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_names_its_source(name):
    assert "Source:" in getattr(algorithms, name).__doc__


def test_an_unknown_algorithm_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"no algorithm 'FedDin'; known are .*FedDyn"):
        _ = algorithms.FedDin


@pytest.mark.parametrize(
    ("name", "down", "up"),
    [
        ("FedAvg", 1, 1),
        ("SCAFFOLD", 2, 2),
        ("FedDyn", 1, 1),
        ("FedDC", 2, 2),
        ("FedCM", 2, 1),
        ("FedAdam", 1, 1),
        ("FedGloSS", 1, 1),
        ("FedSMOO", 2, 2),
        ("FedLESAM", 1, 1),
        ("FedGAMMA", 2, 2),
        ("FedACG", 1, 1),
        ("FedExP", 1, 1),
        ("FedVARP", 1, 1),
        ("FedInit", 1, 1),
        ("FedNSAM", 1, 1),
        ("FedMoSWA", 2, 2),
        ("FedTOGA", 2, 1),
        ("FedWMSAM", 3.25, 1),
    ],
)
def test_vectors_on_the_wire(name, down, up):
    driver = Driver(getattr(algorithms, name)())
    driver.run()
    assert (driver.down / 4, driver.up / 4) == (down, up)


@pytest.mark.parametrize("name", NAMES)
def test_algorithms_that_divide_by_the_learning_rate_say_so(name):
    family = ("SCAFFOLD", "FedDC", "FedCM", "FedGAMMA", "MoFedSAM", "FedLESAM_S", "FedMoSWA", "FedWMSAM")
    family += "FedAdamW", "FedMuon"
    assert getattr(algorithms, name).needs_lr == (name in family)

"""The example of an algorithm outside the package, and the one that its documentation prints."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from jsonargparse import ArgumentParser

from fedlight.algorithms import Algorithm, FedAvgM
from tests.algorithms.driver import Driver
from tests.algorithms.twins import Plain, Problem, local, rounds

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("custom_algorithm", REPOSITORY / "examples/custom_algorithm.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "custom_algorithm", module)
    spec.loader.exec_module(module)
    return module


def fedexp(problem, oracle, eps):
    w = problem.start

    def play(t, selected, lr):
        nonlocal w
        updates = [local(problem, oracle, i, w, lr) - w for i in selected]
        mean = np.mean(updates, axis=0)
        w = w + max(1, sum(u @ u for u in updates) / (2 * len(updates) * (mean @ mean + eps))) * mean
        return w

    return rounds(problem, oracle, play)


def test_the_example_takes_the_papers_step(example):
    problem = Problem()
    expected = fedexp(problem, Plain(problem), 1e-4)
    np.testing.assert_allclose(Driver(example.FedExP(1e-4), problem).run(), expected, rtol=0, atol=1e-10)


def test_the_example_trains(example, tmp_path):
    settings = {"max_rounds": 2, "clients_per_round": 3, "accelerator": "cpu", "devices": 1}
    trainer = example.main(**settings, default_root_dir=tmp_path, enable_progress_bar=False)
    assert trainer.current_round == 2
    assert trainer.callback_metrics["val/accuracy"] > 0.2


def test_the_example_is_named_in_yaml_by_its_import_path(example, tmp_path):
    config = tmp_path / "algorithm.yaml"
    config.write_text("class_path: custom_algorithm.FedExP\ninit_args: {eps: 0.5}\n")
    parser = ArgumentParser()
    parser.add_subclass_arguments(Algorithm, "algorithm")
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.53
    made = instantiate(parser.parse_args([f"--algorithm={config}"]))
    assert isinstance(made.algorithm, example.FedExP)
    assert made.algorithm.eps == 0.5


def test_the_method_in_the_documentation_is_fedavg_with_momentum():
    text = (REPOSITORY / "docs/add_an_algorithm.md").read_text()
    source = next(
        block for block in re.findall(r"```python[^\n]*\n(.*?)```", text, re.DOTALL) if "class Momentum" in block
    )
    names: dict = {}
    exec(source, names)
    problem = Problem()
    expected = Driver(FedAvgM(1.0, 0.9), problem).run()
    np.testing.assert_allclose(Driver(names["Momentum"](0.9), problem).run(), expected, rtol=0, atol=1e-12)

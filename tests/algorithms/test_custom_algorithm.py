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


def majority_vote(problem, oracle, step):
    w = problem.start

    def play(t, selected, lr):
        nonlocal w
        moved = [local(problem, oracle, i, w, lr) > w for i in selected]
        more = np.sum(moved, axis=0) - len(selected) / 2
        w = w + np.where(more > 0, step, np.where(more < 0, -step, 0.0))
        return w

    return rounds(problem, oracle, play)


def test_the_example_takes_the_step_that_most_clients_want(example):
    problem = Problem()
    expected = majority_vote(problem, Plain(problem), 0.25)
    np.testing.assert_allclose(Driver(example.MajorityVote(0.25), problem).run(), expected, rtol=0, atol=1e-10)


def test_the_example_trains(example, tmp_path):
    settings = {"max_rounds": 2, "clients_per_round": 3, "accelerator": "cpu", "devices": 1}
    trainer = example.main(**settings, default_root_dir=tmp_path, enable_progress_bar=False)
    assert trainer.current_round == 2
    assert trainer.callback_metrics["val/accuracy"] > 0.2


def test_the_example_is_named_in_yaml_by_its_import_path(example, tmp_path):
    config = tmp_path / "algorithm.yaml"
    config.write_text("class_path: custom_algorithm.MajorityVote\ninit_args: {step: 0.5}\n")
    parser = ArgumentParser()
    parser.add_subclass_arguments(Algorithm, "algorithm")
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.53
    made = instantiate(parser.parse_args([f"--algorithm={config}"]))
    assert isinstance(made.algorithm, example.MajorityVote)
    assert made.algorithm.step == 0.5


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

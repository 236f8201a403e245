"""The YAML of a study: what it means, and what is refused."""

import random
from pathlib import Path

import pytest
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.cli.command import yaml_argument
from fedlight.studies.plan import command, plan
from fedlight.studies.study import Distribution, load_study

BASE = {"method": "grid", "command": ["fedlight", "fit", "${args}"], "parameters": {"a": {"values": [1, 2]}}}


def load(tmp_path, **changes):
    content = {k: v for k, v in {**BASE, **changes}.items() if v is not ...}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_study(path)


def test_a_grid_is_every_combination(tmp_path):
    parameters = {"b": {"values": [3, 4]}, "a": {"value": 1}, "c": {"min": 1, "max": 2}}
    runs = plan(load(tmp_path, parameters=parameters))
    assert [run.parameters for run in runs] == [{"a": 1, "b": b, "c": c} for b in (3, 4) for c in (1, 2)]
    assert [run.label for run in runs] == ["b3_c1", "b3_c2", "b4_c1", "b4_c2"]
    assert len({run.name for run in runs}) == 4
    assert plan(load(tmp_path, parameters=parameters)) == runs
    assert len(plan(load(tmp_path, parameters=parameters, run_cap=3))) == 3
    assert len(plan(load(tmp_path, parameters=parameters, run_cap=3), count=2)) == 2


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    load(tmp_path)
    with (tmp_path / "study.yaml").open("a") as file:
        file.write("parameters: {b: {value: 3}}\n")
    with pytest.raises(MisconfigurationException, match=r"study.yaml: parameters is there twice"):
        load_study(tmp_path / "study.yaml")


def test_nested_parameters_reach_the_run_as_one_dictionary(tmp_path):
    study = load(tmp_path, parameters={"net": {"parameters": {"x": {"values": [1, 2]}, "y": {"value": 3}}}})
    assert [run.parameters for run in plan(study)] == [{"net": {"x": 1, "y": 3}}, {"net": {"x": 2, "y": 3}}]


def test_a_random_study_draws_the_same_values_every_time(tmp_path):
    parameters = {"lr": {"distribution": "log_uniform_values", "min": 0.01, "max": 1.0}, "k": {"min": 1, "max": 9}}
    first = plan(load(tmp_path, method="random", run_cap=40, parameters=parameters))
    assert plan(load(tmp_path, method="random", run_cap=40, parameters=parameters)) == first
    rates = [run.parameters["lr"] for run in first]
    assert 0.01 <= min(rates) < 0.1 < max(rates) <= 1
    assert {run.parameters["k"] for run in first} == set(range(1, 10))
    # More runs, or another parameter, leave the runs that were there as they are.
    more = plan(load(tmp_path, method="random", parameters={**parameters, "a": {"min": 0.0, "max": 1.0}}), count=50)
    assert [run.parameters["lr"] for run in more][:40] == rates


def test_what_is_drawn_again_is_run_once_and_said(tmp_path, caplog):
    runs = plan(load(tmp_path, method="random", run_cap=6, parameters={"k": {"values": [1, 2]}}))
    assert sorted(run.parameters["k"] for run in runs) == [1, 2]
    assert "4 of 6 runs have the parameters of another: each is run once" in caplog.text


def test_labels_say_what_differs(tmp_path):
    man = [{"class_path": "MAN", "init_args": {"zeta": 0.15}}]
    parameters = {
        "algorithm": {"values": ["configs/algorithm/feddyn.yaml", "FedSAM"]},
        "trainer.callbacks": {"values": [None, man]},
        "trainer.clients_per_round": {"values": [0.1, 0.25]},
        "seed_everything": {"values": [0, 1]},
        "trainer.max_rounds": {"value": 3},
    }
    labels = [run.label for run in plan(load(tmp_path, parameters=parameters))]
    assert labels[0] == "feddyn_seed0_callbacks-none_clients-per-round0.1"
    assert labels[-1] == "FedSAM_seed1_MAN-zeta0.15_clients-per-round0.25"
    assert len(set(labels)) == 16


def test_the_command_is_the_agents_with_a_folder_and_without_wandb(tmp_path):
    words = ["${env}", "${interpreter}", "my.py", "fit", "-c", "x.yaml", "--trainer.logger=wandb", "${args}"]
    parameters = {"trainer.callbacks": {"value": None}, "flag": {"value": True}, "views": {"value": ["server", "all"]}}
    study = load(tmp_path, name="My study", command=words, parameters=parameters)
    (run,) = plan(study)
    built = command(study, run, Path("out"), resume=False)
    assert built[1:] == [
        "my.py",
        "fit",
        "-c",
        "x.yaml",
        "--flag=True",
        "--trainer.callbacks=None",
        "--views=['server', 'all']",
        "--trainer.default_root_dir=out/My-study",
        f"--trainer.name={run.name}",
    ]
    assert command(study, run, Path("out"), resume=True) == [*built, "--ckpt_path=last"]


@pytest.mark.slow
def test_flags_are_those_of_wandb(tmp_path):
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    values = {"a": 1, "b.c": [1, None], "d": None, "e": False, "f": True, "g": 1e-05, "h": "it's", "i": {"k": [True]}}
    flags = utils.create_sweep_command_args({"args": {k: {"value": v} for k, v in values.items()}})
    for macro in ("args", "args_no_equals", "args_no_boolean_flags"):
        parameters = {k: {"value": v} for k, v in values.items()}
        study = load(tmp_path, command=["x", "fit", f"${{{macro}}}"], parameters=parameters)
        assert command(study, plan(study)[0], Path("r"), False)[2:-2] == flags[macro]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("--a=None", "--a=null"),
        ("--a=[1, None]", "--a=[1, null]"),
        (
            "--a=[{'class_path': 'MAN', 'init_args': {'layers': None}}]",
            '--a=[{"class_path": "MAN", "init_args": {"layers": null}}]',
        ),
        ("--a='None'", "--a='None'"),
        ("--a=Nonesuch.yaml", "--a=Nonesuch.yaml"),
        ("--a=[MAN, None]", "--a=[MAN, None]"),
        ("None", "None"),
        ("--a=True", "--a=True"),
    ],
)
def test_values_that_python_wrote(written, read):
    assert yaml_argument(written) == read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paramters": {}}, "`paramters` is not known; did you mean 'parameters'"),
        ({"method": "gird"}, "`method: gird` is not known; it must be grid or random; did you mean 'grid'"),
        ({"method": ...}, "`method: None` is not known"),
        ({"method": "bayes"}, "which W&B does: start it with `wandb sweep`"),
        ({"parameters": {}}, "`parameters` must map names"),
        ({"parameters": {"a": 3}}, r"`parameters.a` must be a mapping, as {value: 3}"),
        ({"parameters": {"a": {"valeus": [1]}}}, "`parameters.a.valeus` is not known; did you mean 'values'"),
        ({"parameters": {"a": {"values": []}}}, "`parameters.a.values` must be a list with something in it"),
        ({"parameters": {"a": {}}}, "says nothing to take"),
        ({"parameters": {"a": {"min": 1, "max": 0}}}, "min 1 is not below max 0"),
        (
            {"parameters": {"a": {"min": "1e-3", "max": 2.5}}},
            "`parameters.a.min` must be a number for uniform.* 1.0e-3",
        ),
        ({"parameters": {"a": {"min": 0.1, "max": 1.0}}}, "a grid takes value, values, int_uniform and q_uniform"),
        ({"parameters": {"a": {"distribution": "unifrom"}}}, "not known; did you mean 'uniform'"),
        ({"parameters": {"a": {"distribution": "uniform", "min": "1e-3", "max": 1}}}, "YAML wants 1.0e-3"),
        ({"parameters": {"a": {"distribution": "normal", "min": 1}}}, "`parameters.a.min` is not known"),
        ({"parameters": {"a": {"values": [1], "probabilities": [0.5]}}}, "1 numbers whose sum is 1"),
        ({"parameters": {"a b": {"value": 1}}}, "is no name of a parameter"),
        ({"parameters": {"ckpt_path": {"value": "x"}}}, "a study sets ckpt_path itself"),
        ({"parameters": {"a": {"parameters": {"b": {"vale": 1}}}}}, "`parameters.a.parameters.b.vale` is not known"),
        ({"command": ["fedlight", "validate", "${args}"]}, "`command` runs no `fit`"),
        ({"command": ["fedlight", "fit"]}, "passes no parameters on"),
        ({"command": "fedlight fit"}, "must be a list of words"),
        ({"run_cap": 0}, "`run_cap` must be a whole number"),
    ],
)
def test_bad_studies_are_refused_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(MisconfigurationException, match=message):
        load(tmp_path, **changes)


def test_macros_that_only_wandb_fills_in(tmp_path):
    study = load(tmp_path, command=["x", "fit", "${args_json_file}"])
    with pytest.raises(MisconfigurationException, match="which fedlight does not read"):
        command(study, plan(study)[0], Path("r"), False)
    study = load(tmp_path, command=["${program}", "fit", "${args}"])
    with pytest.raises(MisconfigurationException, match="there is no `program`"):
        command(study, plan(study)[0], Path("r"), False)


def test_a_random_study_needs_a_number(tmp_path):
    with pytest.raises(MisconfigurationException, match="set run_cap in its YAML, or pass --count"):
        plan(load(tmp_path, method="random"))


def test_files_that_are_no_study(tmp_path):
    with pytest.raises(MisconfigurationException, match="cannot be read"):
        load_study(tmp_path / "none.yaml")
    path = tmp_path / "bad.yaml"
    path.write_text("a: [1")
    with pytest.raises(MisconfigurationException, match="is no YAML"):
        load_study(path)
    path.write_text("- 1")
    with pytest.raises(MisconfigurationException, match="is no mapping"):
        load_study(path)


@pytest.mark.parametrize(
    ("spec", "low", "high", "mean"),
    [
        ({"min": 2.0, "max": 4.0}, 2, 4, 3.0),
        ({"min": 1, "max": 3}, 1, 3, 2.0),
        ({"distribution": "log_uniform", "min": -1, "max": 1}, 0.367, 2.72, 1.175),  # (e − 1/e) / 2
        ({"distribution": "inv_log_uniform_values", "min": 1, "max": 4}, 1, 4, 2.164),  # 3 / ln 4
        ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.25}, 0, 1, 0.5),
        ({"distribution": "q_log_uniform_values", "min": 1, "max": 100, "q": 10}, 0, 100, 21.5),  # 99 / ln 100
        ({"distribution": "normal", "mu": 5}, 0, 10, 5.0),
        ({"distribution": "log_normal", "sigma": 0.5}, 0, 20, 1.133),  # exp(1/8)
        ({"distribution": "beta", "a": 2, "b": 6}, 0, 1, 0.25),
        ({"values": [1, 5], "probabilities": [0.75, 0.25]}, 1, 5, 2.0),
    ],
)
def test_distributions(spec, low, high, mean):
    distribution, rng = Distribution.of(spec, "a", nested=True), random.Random(0)
    draws = [distribution.draw(rng) for _ in range(4000)]
    assert low <= min(draws)
    assert max(draws) <= high
    assert sum(draws) / 4000 == pytest.approx(mean, rel=0.06)
    if "q" in spec:
        assert all(d / spec["q"] == round(d / spec["q"]) for d in draws)


def test_a_quantised_grid():
    assert Distribution.of({"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.25}, "a").values() == [
        0.0,
        0.25,
        0.5,
        0.75,
    ]

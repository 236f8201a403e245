"""What belongs together, what it is called, and the statistics of it."""

import math
import os

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.report.groups import Stat, gain, group_runs, left_out
from fedlight.report.naming import Method, setting_of
from fedlight.report.runs import Run, find_runs
from fedlight.report.tables import default_target
from fedlight.run.names import dotted
from tests.report.folders import MAN, config, write_run, write_study

SAM = {"class_path": "fedlight.perturbations.SAM", "init_args": {"rho": 0.05}}


def run(accuracy: list[float], **settings) -> Run:
    rows = [{"round": float(i), "val/accuracy": a} for i, a in enumerate(accuracy)]
    return Run(f"run{id(rows)}", "finished", "", dotted(config(**settings)), rows)


def man(zeta: float) -> dict:
    return {"class_path": "fedlight.MAN", "init_args": {"zeta": zeta}}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "FedAvg"),
        ({"callbacks": [MAN]}, "FedAvg+MAN"),
        ({"algorithm": "algorithms.FedDyn", "perturbation": SAM, "callbacks": [MAN]}, "FedDyn+SAM+MAN"),
        ({"callbacks": [man(0)]}, "FedAvg"),
        ({"callbacks": [{"class_path": "fedlight.callbacks.HessianSpectrum"}]}, "FedAvg"),
        ({"callbacks": [{"class_path": "no.such.Thing"}]}, "FedAvg+Thing"),  # it may be a penalty
        ({"callbacks": MAN}, "FedAvg+MAN"),
        ({"algorithm": "FedDyn", "centralized": True, "callbacks": [MAN]}, "Central+MAN"),
    ],
)
def test_names_follow_from_the_config(settings, name):
    assert Method(dotted(config(**settings))).name == name


def test_seeds_folders_and_devices_do_not_tell_settings_apart():
    one = setting_of(dotted(config(seed=0)))
    assert one == setting_of(dotted(config("FedDyn", seed=1, callbacks=[MAN], name="y", accelerator="gpu")))
    assert one == setting_of(dotted(config(enable_plots=False)))
    stock = {"class_path": "my.Data", "init_args": {"folder": "a", "num_workers": 0}}
    divided = [dotted({"data": {"init_args": {"datamodule": stock}}}) for stock["init_args"]["num_workers"] in (0, 4)]
    assert setting_of(divided[0]) == setting_of(divided[1])
    assert one != setting_of(dotted(config(alpha=0.6)))
    assert one != setting_of(dotted(config(local_epochs=2)))
    assert one != setting_of(dotted(config(limit_val_batches=2)))  # accuracies of other samples


def test_seeds_are_means():
    study = group_runs([run([0.5], seed=0), run([0.7], seed=1), run([0.9], seed=2)])
    (group,) = study.groups
    assert (group.label, group.setting_label) == ("FedAvg", "digits")
    stat = group.stat("val/accuracy")
    assert (stat.mean, stat.count) == (pytest.approx(0.7), 3)
    assert stat.std == pytest.approx(0.2)  # √((0.04 + 0 + 0.04) / 2)
    assert Stat.of([0.5]) == Stat(0.5, None, 1)
    assert Stat.of([None, math.nan]) is None


def test_labels_hold_what_differs_and_no_more():
    study = group_runs(
        [
            run([0.1], callbacks=[man(0.1)]),
            run([0.2], callbacks=[man(0.2)]),
            run([0.3]),
            run([0.4], alpha=0.6),
            run([0.5], alpha=0.6, local_epochs=5),
        ]
    )
    assert study.methods == ["FedAvg", "FedAvg+MAN (zeta=0.1)", "FedAvg+MAN (zeta=0.2)"]
    assert study.settings == ["alpha=0.3", "alpha=0.6", "alpha=0.6, local_epochs=5"]


def test_names_of_personal_parts_tell_methods_apart():
    alternating = {"class_path": "PersonalParts", "init_args": {"parts": ["head"], "train": "alternating"}}
    given = "head", ["head"], ["body", "bias"], alternating, None
    study = group_runs([run([0.1], personal=parts) for parts in given])
    told = "(parts=[head])", "(parts=[body, bias])", "(parts=[head], train=alternating)"
    assert sorted(study.methods) == sorted(["FedAvg", *(f"FedAvg+PersonalParts {said}" for said in told)])
    assert len(study.settings) == 1


def test_a_run_that_was_made_twice_counts_once():
    study = group_runs([run([0.1], seed=0), run([0.2], seed=0), run([0.4], seed=1)])
    assert study.groups[0].stat("val/accuracy").mean == pytest.approx(0.3)
    assert [r.last("val/accuracy") for r in study.repeated] == [0.1]


def test_a_run_that_may_stop_early_repeats_no_other():
    stops = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}}
    study = group_runs([run([0.1, 0.2]), run([0.1], callbacks=[stops])])
    assert study.repeated == []
    assert "monitor=val/loss" in study.settings


def test_runs_without_a_seed_are_repetitions_of_none():
    runs = [run([0.1], seed=0), run([0.2], seed=False), run([0.3], seed=False), run([0.3], seed=False)]  # a copy
    study = group_runs(runs)
    assert [r.last("val/accuracy") for r in study.groups[0].runs] == [0.1, 0.2, 0.3]
    assert len(study.repeated) == 1


def test_the_newer_of_two_is_told_by_its_rounds_and_not_by_its_place(tmp_path):
    paths = [write_run(tmp_path / name / "version_0", [accuracy]) for name, accuracy in (("new", 0.2), ("old", 0.1))]
    os.utime(paths[1] / "metrics.csv", (1, 1))
    study = group_runs(find_runs([tmp_path]))
    assert study.groups[0].stat("val/accuracy").mean == 0.2
    assert [r.path.parent.name for r in study.repeated] == ["old"]


def test_of_versions_beside_one_another_the_later_counts_whenever_it_was_copied(tmp_path):
    for version, accuracy in ((2, 0.1), (10, 0.2)):
        path = write_run(tmp_path / "a" / f"version_{version}", [accuracy])
        os.utime(path / "metrics.csv", (100 - version, 100 - version))
    assert group_runs(find_runs([tmp_path])).groups[0].stat("val/accuracy").mean == 0.2


def test_classes_of_one_name_and_numbers_that_look_alike_are_methods_of_their_own():
    first, second = run([0.1]), run([0.9])
    first.config["algorithm.class_path"], second.config["algorithm.class_path"] = "one.FedX", "two.FedX"
    assert group_runs([first, second]).methods == ["FedX (of=one)", "FedX (of=two)"]
    near = group_runs([run([0.1], callbacks=[man(0.1)]), run([0.9], callbacks=[man(0.1 + 1e-9)])])
    assert near.methods == ["FedAvg+MAN (zeta=0.1) #1", "FedAvg+MAN (zeta=0.1) #2"]


def test_unfinished_runs_are_no_part_of_means():
    broken = run([0.9], seed=1)
    broken.status = "interrupted"
    study = group_runs([run([0.1]), broken])
    assert study.groups[0].stat("val/accuracy").mean == 0.1
    assert study.labels[str(broken.path)] == ("FedAvg", "digits")


def test_the_gain_of_man_is_that_of_the_common_seeds():
    runs = [run([0.5], seed=0), run([0.6], seed=1), run([0.0], seed=2)]
    runs += [run([0.6], seed=0, callbacks=[MAN]), run([0.8], seed=1, callbacks=[MAN])]
    study = group_runs(runs)
    with_man = study.find("FedAvg+MAN", "digits")
    found = gain(with_man, study.counterpart(with_man), "val/accuracy")
    assert (found.mean, found.count) == (pytest.approx(0.15), 2)
    assert found.std == pytest.approx(0.1 / math.sqrt(2))
    assert study.counterpart(study.find("FedAvg", "digits")) is None
    for i, one in enumerate(runs):  # the same, where the data's seed tells them apart
        one.config |= {"seed_everything": 0, "data.init_args.seed": i % 3}
    study = group_runs(runs)
    assert gain(study.find("FedAvg+MAN", "digits"), study.find("FedAvg", "digits"), "val/accuracy") == found


def test_gain_without_common_seeds_is_that_of_the_means():
    study = group_runs([run([0.5], seed=0), run([0.75], seed=1, callbacks=[MAN])])
    found = gain(study.groups[1], study.groups[0], "val/accuracy")
    assert (found.mean, found.std) == (0.25, None)


def test_rounds_to_a_target():
    study = group_runs([run([0.1, 0.5, 0.4, 0.6], seed=0), run([0.1, 0.2, 0.3, 0.5], seed=1), run([0.1] * 4, seed=2)])
    stat, reached = study.groups[0].cost_to("val/accuracy", 0.5)
    assert (stat.mean, reached) == (3.0, 2)
    assert study.groups[0].cost_to("val/accuracy", 0.7) == (None, 0)


@pytest.mark.parametrize(("final", "target"), [(0.57, 0.57), (0.579, 0.57), (0.29, 0.29)])
def test_the_target_is_a_whole_percent(final, target):
    groups = group_runs([run([final]), run([0.9], callbacks=[MAN])]).groups
    assert default_target(groups, "val/accuracy") == target


def test_what_was_sent_until_a_target():
    runs = [run([0.1, 0.5, 0.6], seed=0), run([0.1, 0.2, 0.5], seed=1)]
    for row in (row for r in runs for row in r.rows):
        row |= {"comm/down_mb": 1.0, "comm/up_mb": 2.0 + row["round"], "val/loss": 1 - row["val/accuracy"]}
    (group,) = group_runs(runs).groups
    assert group.spent("comm/down_mb", "comm/up_mb") == {1: 3.0, 2: 7.0, 3: 12.0}
    assert group.spent("clients/gradients") == {}
    stat, reached = group.cost_to("val/accuracy", 0.5, "comm/down_mb", "comm/up_mb")
    assert (stat.mean, reached) == ((7 + 12) / 2, 2)
    assert group.cost_to("val/loss", 0.5)[0].mean == 2.5, "a loss has to fall to its target"


def test_intervals_are_those_of_students_t():
    # The quantiles 12.7062 and 4.30265 of Student's t with 1 and 2 degrees of freedom stand in every table of it.
    assert Stat.of([0.1, 0.2]).half_width == pytest.approx(12.7062 * math.sqrt(0.005) / math.sqrt(2), rel=1e-5)
    assert Stat.of([0.10, 0.12, 0.14]).half_width == pytest.approx(4.30265 * 0.02 / math.sqrt(3), rel=1e-5)
    assert Stat.of([0.1]).half_width is None


def test_objects_in_a_setting_are_called_by_their_classes():
    clip = {"class_path": "fedlight.transforms.ClipUpdate", "init_args": {"norm": 1.0}}
    other = {"class_path": "mine.ClipUpdate", "init_args": {"norm": 1.0}}
    bits = [{"class_path": "fedlight.transforms.Quantize", "init_args": {"bits": n}} for n in (4, 8)]
    chains = [None, [clip], [other], [clip, bits[0]], [clip, bits[1]], [{"a": {"b": 2}}]]
    study = group_runs([run([0.1], transforms=chain) for chain in chains])
    assert study.settings == [
        "transforms=null",
        "ClipUpdate, norm=1 #2",
        "ClipUpdate, norm=1 #3",
        "ClipUpdate, norm=1, Quantize, bits=4",
        "ClipUpdate, norm=1, Quantize, bits=8",
        "transforms=[(a=(b=2))]",
    ]
    assert group_runs([run([0.1], transforms=[clip, b]) for b in bits]).settings == ["bits=4", "bits=8"]


def test_a_baseline_is_a_label_or_a_name_that_is_one_methods():
    study = group_runs([run([0.1]), run([0.2], callbacks=[man(0.1)]), run([0.3], callbacks=[man(0.2)])])
    assert study.baseline("FedAvg") == "FedAvg"
    assert study.baseline("FedAvg+MAN (zeta=0.1)") == "FedAvg+MAN (zeta=0.1)"
    with pytest.raises(MisconfigurationException, match=r"--baseline 'FedAvg\+MAN' may be several of the methods"):
        study.baseline("FedAvg+MAN")
    with pytest.raises(
        MisconfigurationException, match=r"'FedDyn' is not among the runs; they are FedAvg, FedAvg\+MAN"
    ):
        study.baseline("FedDyn")


def test_curves_are_means_of_the_seeds_that_have_a_value():
    study = group_runs([run([0.2, 0.4], seed=0), run([0.4], seed=1)])
    rounds, means, stds = study.groups[0].curve("val/accuracy")
    assert rounds == [1, 2]
    assert means == pytest.approx([0.3, 0.4])
    assert stds == pytest.approx([math.sqrt(0.02), 0.0])
    assert left_out(study.groups, ["val/accuracy"]) == ""
    said = " Left out of means: FedAvg, seed 1: val/accuracy after its last round, 1."
    assert left_out(study.groups, ["val/accuracy"], ever=True) == said


def test_methods_come_in_pairs_and_central_training_last(tmp_path):
    study = group_runs(find_runs([write_study(tmp_path)]))
    assert study.methods == ["FedAvg", "FedAvg+MAN", "FedDyn", "FedDyn+MAN", "Central"]
    assert study.settings == ["alpha=0.3", "alpha=0.6"]


def test_a_version_of_each_seed(tmp_path):
    write_run(tmp_path / "x" / "version_0", [0.25], config(seed=0))
    write_run(tmp_path / "x" / "version_1", [0.75], config(seed=1))
    (group,) = group_runs(find_runs([tmp_path])).groups
    assert group.stat("val/accuracy").mean == 0.5


def test_central_training_counts_whatever_the_partition(tmp_path):
    central = run([0.9], centralized=True, clients_per_round=1.0)
    other = run([0.8], centralized=True, local_epochs=7)
    study = group_runs([run([0.1]), run([0.2], alpha=0.6), central, other])
    assert [g.setting_label for g in study.groups if g.method.is_central] == [
        "alpha=0.3",
        "alpha=0.6",
        "alpha=0.3, local_epochs=7",
    ]
    assert len(study.used) == 4


def test_central_training_of_less_work_stands_beside_the_methods():
    """``limit_train_batches`` makes its work that of a federated round; it tells two central lines apart."""
    less = run([0.8], centralized=True, limit_train_batches=0.1)
    study = group_runs([run([0.1]), less])
    assert [(g.label, g.setting_label) for g in study.groups] == [("FedAvg", "digits"), ("Central", "digits")]
    study = group_runs([run([0.1]), less, run([0.9], centralized=True)])
    assert study.settings == ["digits"]
    assert not study.repeated
    labels = {g.label: g.stat("val/accuracy").mean for g in study.groups if g.method.is_central}
    assert labels == {"Central (limit_train_batches=0.1)": 0.8, "Central (limit_train_batches=null)": 0.9}

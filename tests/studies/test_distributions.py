"""W&B's own package is the judge: what it takes is taken here, what it refuses is refused, and draws are alike."""

import itertools
import math
import random
import warnings

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.studies.plan import plan
from fedlight.studies.study import Distribution, load_study
from tests.studies.helpers import write_study

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    REASON = "wandb's sweep schema is not here: pip install --no-deps sweeps jsonref; pip install jsonschema"
    sweeps = pytest.importorskip("sweeps", reason=REASON)
    from sweeps.config import schema_violations_from_proposed_config
    from sweeps.params import HyperParameter

BOUNDS, BELL, SHAPE = {"min": 0.5, "max": 4.0}, {"mu": 1.0, "sigma": 0.5}, {"a": 2, "b": 3}
GOOD = {
    "constant": {"value": 3},
    "categorical": {"values": [1, "x", None]},
    "categorical_w_probabilities": {"values": [1, 2], "probabilities": [0.25, 0.75]},
    "int_uniform": {"min": 1, "max": 4},
    "uniform": BOUNDS,
    "q_uniform": {**BOUNDS, "q": 0.5},
    "log_uniform": BOUNDS,
    "q_log_uniform": {**BOUNDS, "q": 0.5},
    "inv_log_uniform": BOUNDS,
    "log_uniform_values": BOUNDS,
    "q_log_uniform_values": {**BOUNDS, "q": 0.5},
    "inv_log_uniform_values": BOUNDS,
    "normal": BELL,
    "q_normal": {**BELL, "q": 0.5},
    "log_normal": BELL,
    "q_log_normal": {**BELL, "q": 0.5},
    "beta": SHAPE,
    "q_beta": {**SHAPE, "q": 0.5},
}
ODD = {
    "min": [0, 0.0, 1, 4, 4.0, 5, -1, "1e-3", None, True],
    "max": [1, 4, 0.5, 0, -2.0, "3", None, [4]],
    "q": [1, 2, 0.25, 0, -1, "1", None, True],
    "mu": [0, -3, "0", None],
    "sigma": [0, 2, -1, "1", None],
    "a": [0, 0.5, -1, "1"],
    "b": [0, 0.5, -1, None],
    "value": [None, True, [1, 2], {"a": 1}, "text"],
    "values": [[], [1], [1, 1, 1.0], "text", {"a": 1}, None, [[1], [1], {"a": 1}], [True, 1]],
    "probabilities": [[0.5, 0.5], [0, 1], [0.1, 0.2], [1], [1.5, -0.5], ["0.5", 0.5], 1, None, [0.250004, 0.75], []],
}


def forms():
    """Each distribution as it should be, without each of its keys, with each odd value, with each foreign key."""
    yield {}
    yield {"distribution": None, "value": 1}
    yield {"distribution": "unifrom", **BOUNDS}
    yield {"distribution": ["uniform"], **BOUNDS}
    for low, high in itertools.product((0, 1, 1.0, 0.5, "0"), (2, 2.0, 3.5, 1)):
        yield {"min": low, "max": high}
    for kind, good in GOOD.items():
        for given in ({"distribution": kind}, {}):
            yield {**given, **good}
            yield given
            for key in good:
                yield {**given, **{k: v for k, v in good.items() if k != key}}
            for key, values in ODD.items():
                odd = values if key in good and given else values[:1]
                yield from ({**given, **good, key: value} for value in odd)


FORMS = list({repr(form): form for form in forms()}.values())


VALID = {}


def theirs(parameters, method):
    """Whether W&B takes a sweep with these parameters, and can suggest a run."""
    config = {"method": method, "parameters": parameters}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a spread it draws NaN
        try:
            if repr(parameters) not in VALID:
                VALID[repr(parameters)] = not schema_violations_from_proposed_config(config)
            return VALID[repr(parameters)] and bool(sweeps.next_runs(config, []))
        except (TypeError, ValueError):
            return False


@pytest.fixture
def ours(tmp_path):
    def runs(parameters, method):
        path = write_study(tmp_path, parameters, method=method, run_cap=20)
        try:
            return plan(load_study(path))
        except MisconfigurationException:
            return []

    return runs


@pytest.mark.slow
@pytest.mark.parametrize("method", ["random", "grid"])
def test_the_verdict_is_that_of_wandb(method, ours):
    assert len(FORMS) > 300
    found = {repr(form): (bool(ours({"a": form}, method)), theirs({"a": form}, method)) for form in FORMS}
    assert {form: verdicts for form, verdicts in found.items() if verdicts[0] != verdicts[1]} == {}
    assert 20 < sum(verdict for verdict, _ in found.values()) < 200


@pytest.mark.parametrize("method", ["random", "grid"])
@pytest.mark.parametrize("kind", GOOD)
def test_the_verdict_on_nested_parameters_is_that_of_wandb(kind, method, ours):
    good = {"distribution": kind, **GOOD[kind]}
    for form in (good, GOOD[kind], {**good, "min": 9}, {**good, "foreign": 1}):
        nested = {"a": {"parameters": {"b": {"parameters": {"c": form}}, "d": {"value": 1}}}}
        assert bool(ours(nested, method)) == theirs(nested, method), form
    assert not ours({"a": {"parameters": {}}}, method)
    assert not ours({"a": {"parameters": {"b": {"value": 1}}, "value": 1}}, method)


def test_a_grid_has_the_values_of_wandb(ours):
    forms = [form for form in FORMS if theirs({"a": form}, "grid")]
    assert len(forms) > 20
    for form in forms:
        config = {"method": "grid", "parameters": {"a": form, "b": {"values": [1, 2]}}}
        their_runs = [run.config for run in sweeps.next_runs(config, [], n=20) if run is not None]
        values = [{k: {"value": v} for k, v in run.parameters.items()} for run in ours(config["parameters"], "grid")]
        assert repr(values) == repr(their_runs)  # 1 is not 1.0


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("change", [{}, {"q": 2}, {"min": 1, "max": 3}])
def test_draws_are_alike(kind, change):
    form = {"distribution": kind, **GOOD[kind]}
    form |= {key: value for key, value in change.items() if key in form}
    distribution, judge, rng = (
        Distribution.of(form, "a", nested=True),
        HyperParameter("a", dict(form)),
        random.Random(0),
    )
    draws = [distribution.draw(rng) for _ in range(2000)]
    their_draws = [judge.ppf((i + 0.5) / 2000) for i in range(2000)]
    plain = [getattr(value, "item", lambda value=value: value)() for value in their_draws]
    assert {type(value) for value in draws} == {type(value) for value in plain}
    if kind.startswith("categorical"):
        assert set(draws) == set(plain)
    else:
        ranks = [200, 1000, 1800]
        quantiles = [sorted(draws)[rank] for rank in ranks]
        step = form.get("q", 0)
        assert quantiles == pytest.approx([sorted(plain)[rank] for rank in ranks], rel=0.1, abs=max(0.1, step))
        if "min" in form:
            assert min(plain) - 1e-3 <= min(draws) + 1e-3
            assert max(draws) <= max(plain) + 1e-3 + 1e-2 * max(plain)


def test_without_a_spread_a_distribution_is_a_point():
    rng = random.Random(0)
    points = {
        "normal": ({"mu": 2.0, "sigma": 0}, 2.0),
        "log_normal": ({"mu": 1.0, "sigma": 0}, math.e),
        "beta": ({"a": 0, "b": 3}, 0.0),
        "q_beta": ({"a": 2, "b": 0, "q": 0.5}, 1.0),
    }
    for kind, (settings, point) in points.items():
        assert Distribution.of({"distribution": kind, **settings}, "a").draw(rng) == pytest.approx(point)


@pytest.mark.parametrize("kind", ["log_uniform", "inv_log_uniform", "q_log_uniform"])
def test_exponents_are_refused_with_what_was_meant(kind, tmp_path):
    form = {"distribution": kind, "min": 0.0001, "max": 0.1}
    path = write_study(tmp_path, {"lr": form}, method="random", run_cap=3)
    message = rf"`parameters.lr`: min and max of {kind} are exponents of e, found 0.0001 .* Use {kind}_values"
    with pytest.raises(MisconfigurationException, match=message):
        load_study(path)
    assert Distribution.of(form, "a", nested=True).draw(random.Random(0)) == pytest.approx(1, abs=0.11)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"min": 0.0, "max": 1.0}, "a grid takes value, values, int_uniform and q_uniform, not uniform"),
        ({"distribution": "int_uniform", "min": 1.0, "max": 3}, "`parameters.a.min` must be a whole number"),
        ({"distribution": "normal", "sigma": -1}, "`parameters.a.sigma` must not be below 0"),
        ({"distribution": "constant"}, "`parameters.a`: constant needs value"),
        ({"values": [1, 2], "probabilities": 3}, "must be 2 numbers whose sum is 1, found 3"),
        ({"distribution": "uniform", "min": math.inf, "max": 1}, "must be a number for uniform, found inf"),
        ({"distribution": None, "value": 1}, "`parameters.a.distribution: None` is not known"),
    ],
)
def test_refusals_name_the_key(form, message, tmp_path):
    with pytest.raises(MisconfigurationException, match=message):
        load_study(write_study(tmp_path, {"a": form}))

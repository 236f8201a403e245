"""Sums that are exact, against ``math.fsum``."""

import math
import random
from itertools import pairwise

import pytest
import torch

from fedlight.server.sums import LIMIT, MAX_TERMS, ExactSums, in_range, stack_terms


def terms(seed, count=60, size=40, dtype=torch.float64):
    """Entries from 1e-18 to 1e8, of both signs, with weights as of clients' sample counts."""
    draw = torch.Generator().manual_seed(seed)
    exponents = torch.rand(count, size, generator=draw, dtype=torch.float64) * 26 - 18
    values = torch.randn(count, size, generator=draw, dtype=torch.float64) * 10**exponents
    weights = torch.randint(1, 500, (count, 1), generator=draw).double()
    return list((values.to(dtype).double() * weights).unbind())


def summed(values, together=1):
    sums = ExactSums()
    for i in range(0, len(values), together):
        sums.add(stack_terms([{"x": value} for value in values[i : i + together]]))
    return sums


def merged(parts):
    whole = ExactSums()
    whole.parts = {"x": sum(part.parts["x"] for part in parts)}
    return whole


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_order_and_any_parts_give_the_bits_of_the_exact_sum(seed, dtype):
    values = terms(seed, dtype=dtype)
    expected = summed(values).totals()["x"]
    # What is dropped of each term is at most 2^-83, and one rounding is made at the end.
    for column in range(40):
        exact = math.fsum(float(v[column]) for v in values)
        assert float(expected[column]) == pytest.approx(exact, rel=2**-51, abs=60 * 2**-75)
    shuffle = random.Random(seed)
    for together in (1, 1, 2, 7, 60):
        shuffle.shuffle(values)
        assert torch.equal(summed(values, together).totals()["x"], expected)
        cuts = [0, *sorted(shuffle.sample(range(1, 60), 3)), 60]
        parts = [summed(values[a:b], together) for a, b in pairwise(cuts)]
        shuffle.shuffle(parts)
        assert torch.equal(merged(parts).totals()["x"], expected)


def test_numbers_worked_out_by_hand():
    # 2^35 + 2^-60 − 2^35: a float64 sum in this order gives 0.
    assert summed(torch.tensor([[2.0**35], [2.0**-60], [-(2.0**35)]])).totals()["x"] == 2.0**-60
    tenth = torch.tensor([0.1], dtype=torch.float64)
    assert summed([tenth] * 10).totals()["x"] == math.fsum([0.1] * 10) == 1.0
    assert summed([torch.tensor([2.0**-76])]).totals()["x"] == 0  # below the smallest unit


def test_terms_keep_their_shape_and_memory_does_not_grow():
    sums, term = ExactSums(), {"scalar": torch.tensor(2.0), "half": torch.ones(2, 3, dtype=torch.float16)}
    for _ in range(2):
        sums.add(stack_terms([term, term]))
        assert {name: list(parts.shape) for name, parts in sums.parts.items()} == {"scalar": [3], "half": [3, 2, 3]}
    totals = sums.totals()
    assert totals["scalar"] == 8
    assert torch.equal(totals["half"], torch.full((2, 3), 4.0, dtype=torch.float64))
    assert sums.terms == 4


def test_terms_are_not_changed():
    value = torch.tensor([0.1, 3.7], dtype=torch.float64)
    summed([value])
    assert value.tolist() == [0.1, 3.7]


@pytest.mark.parametrize("size", [2**14 - 1, 2**14, 3 * 2**14 + 5])
def test_long_vectors_are_summed_in_blocks(size):
    values = terms(0, count=4, size=size)
    expected = [math.fsum(float(v[i]) for v in values) for i in range(0, size, 997)]
    for together in (1, 4):
        found = summed(values, together).totals()["x"][::997]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=2**-50, atol=2**-72)


def test_at_the_edge_of_the_range():
    edge = torch.tensor([LIMIT * (1 - 2**-53), 1e-18], dtype=torch.float64)
    assert in_range(stack_terms([{"x": edge}])) == ([True], {"x": float(edge.max())})
    values = [edge, -edge, edge, torch.tensor([-1.0, 1e-18], dtype=torch.float64)]
    exact = [math.fsum(float(v[i]) for v in values) for i in (0, 1)]
    for order in (values, values[::-1]):
        assert summed(order).totals()["x"].tolist() == pytest.approx(exact, rel=2**-52)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), LIMIT, -2 * LIMIT])
def test_what_cannot_be_summed_is_found_first(bad):
    good = {"a": torch.ones(3), "empty": torch.empty(0), "b": torch.tensor(1.0)}
    spoilt = [{**good, "a": torch.tensor([0.0, bad, 1.0])}, {**good, "b": torch.tensor(bad)}]
    assert in_range(stack_terms([good, spoilt[0], good, spoilt[1]]))[0] == [True, False, True, False]


def test_as_many_terms_as_are_exact():
    sums = summed([torch.full((2,), 0.1, dtype=torch.float64)])
    sums.parts["x"] *= 2**17  # as if the same had been added so often
    sums.terms = MAX_TERMS
    assert sums.totals()["x"][0] == 0.1 * 2**17
    with pytest.raises(OverflowError, match="131072 clients"):
        sums.add(stack_terms([{"x": torch.zeros(2)}]))
    with pytest.raises(OverflowError, match="131072 clients"):
        sums.count(MAX_TERMS + 1)  # those of several processes
    assert sums.terms == MAX_TERMS


@pytest.mark.parametrize("largest", [2.0**35, 1.0, 0.5, 0.3, 2.0**-38, 1e-12, 2.0**-75, 1e-30, 0.0])
@pytest.mark.parametrize("k", [1, 3])
def test_units_that_have_no_multiples_need_not_be_looked_at(largest, k):
    draw = torch.Generator().manual_seed(k)
    values = largest * (2 * torch.rand(k, 50, generator=draw, dtype=torch.float64) - 1)
    values[0, 0], values[0, 1] = largest, -largest
    stacked = {"x": values, "scalar": values[:, 0].clone(), "none": values[:, :0]}
    good, bounds = in_range(stacked)
    assert good == [True] * k
    assert bounds == {"x": largest, "scalar": float(values[:, 0].abs().max())}
    looked, known = ExactSums(), ExactSums()
    looked.add(stacked)
    known.add(stacked, bounds)
    assert all(torch.equal(looked.parts[name], known.parts[name]) for name in stacked)


def test_another_shape_is_named():
    sums = summed([torch.ones(2)])
    with pytest.raises(ValueError, match=r"'x' are \[2\] and \[3\]"):
        sums.add(stack_terms([{"x": torch.ones(3)}]))

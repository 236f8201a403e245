"""Samplers: who trains in a round."""

import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.seeding import generator
from fedlight.server.sampling import (
    Bernoulli,
    RoundRobin,
    Sampler,
    Uniform,
    WeightedBySamples,
    balance,
    draw,
    draw_subset,
    expected_clients,
    resolve_clients_per_round,
)


def draws(sampler, num_clients=20, k=5, rounds=2000, sizes=None):
    sampler.setup(num_clients, k, torch.ones(num_clients, dtype=torch.int64) if sizes is None else sizes)
    return [sampler.sample(r, generator(0, "sampling", r)) for r in range(rounds)]


def frequencies(chosen, num_clients=20):
    return torch.bincount(torch.tensor([c for round in chosen for c in round]), minlength=num_clients) / len(chosen)


@pytest.mark.parametrize("sampler", [Uniform(), Bernoulli(), WeightedBySamples(), RoundRobin()])
def test_clients_come_sorted_once_and_never_without_data(sampler):
    sizes = torch.tensor([3, 0, 5, 1, 0, 2, 9, 4])
    for chosen in draws(sampler, 8, 3, 200, sizes):
        assert chosen == sorted(set(chosen))
        assert chosen
        assert not {1, 4} & set(chosen)
    assert sampler.sample(7, generator(0, "sampling", 7)) == sampler.sample(7, generator(0, "sampling", 7))


@pytest.mark.parametrize("sampler", [Uniform(), WeightedBySamples(), RoundRobin()])
def test_fixed_samplers_choose_k_each_equally_often(sampler):
    chosen = draws(sampler)
    assert {len(c) for c in chosen} == {5}
    assert (frequencies(chosen) - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / 2000)


def test_bernoulli_clients_are_independent_and_never_none():
    chosen = draws(Bernoulli(), k=2, rounds=5000)
    sizes = torch.tensor([len(c) for c in chosen]).double()
    none = 0.9**20  # rounds without anyone are drawn again
    assert sizes.min() == 1
    assert abs(sizes.mean() - 2 / (1 - none)) < 4 * 1.34 / math.sqrt(5000)
    assert (frequencies(chosen) - 0.1 / (1 - none)).abs().max() < 0.025
    together = sum(0 in c and 1 in c for c in chosen) / 5000
    assert abs(together - 0.01 / (1 - none)) < 0.006


def test_larger_clients_come_more_often():
    sizes = torch.tensor([1, 2, 3, 4])
    chosen = draws(WeightedBySamples(), 4, 1, 5000, sizes)
    assert (frequencies(chosen, 4) - sizes / 10).abs().max() < 0.03


def test_round_robin_takes_turns():
    chosen = draws(RoundRobin(), 5, 2, 5)
    assert chosen == [[0, 1], [2, 3], [0, 4], [1, 2], [3, 4]]


def test_more_than_there_are_with_data_is_all_of_them():
    sampler = Uniform()
    sampler.setup(5, 4, torch.tensor([1, 0, 2, 0, 3]))
    assert sampler.sample(0, generator(0, "x")) == [0, 2, 4]


@pytest.mark.parametrize(
    ("given", "k"), [(3, 3), (10, 10), (0.25, 2), (0.3, 3), (1.0, 10), (0.001, 1), (0.05, 1), (0.15, 2)]
)
def test_a_number_or_a_fraction_of_ten(given, k):
    assert resolve_clients_per_round(given, 10) == k


@pytest.mark.parametrize("given", [0, -1, 11, 0.0, -0.5, 1.01, float("nan")])
def test_impossible_numbers_are_refused(given):
    with pytest.raises(MisconfigurationException, match="trainer.clients_per_round"):
        resolve_clients_per_round(given, 10)


def test_a_sampler_must_sample():
    with pytest.raises(NotImplementedError, match="Sampler must define sample"):
        Sampler().sample(0, generator(0, "x"))


class Listed(Sampler):
    def __init__(self, drawn):
        self.drawn = drawn

    def sample(self, round, rng):
        return self.drawn


def test_what_a_sampler_of_ones_own_draws_are_different_clients_by_numbers():
    """Tensors hash by where they are: what such a client keeps would be found in no later round."""
    listed = Listed(torch.tensor([5, 2]))
    listed.setup(7, 2, torch.ones(7))
    clients = draw(listed, 0, seed=0)
    assert (clients, {type(client) for client in clients}) == ([2, 5], {int})
    for listed.drawn in ([0, 0, 1], [-1, 2], [1, 7]):
        with pytest.raises(MisconfigurationException, match=r"trainer\.sampler: Listed draws .* each client once"):
            draw(listed, 0, seed=0)


def test_work_is_shared_by_size():
    sizes = torch.tensor([10, 1, 7, 3, 3, 0, 8])
    shares = balance([0, 1, 2, 3, 4, 6], sizes, [0] * 7, 2)
    assert sorted(c for share in shares for c in share) == [0, 1, 2, 3, 4, 6]
    assert [int(sizes[s].sum()) for s in shares] == [16, 16]
    assert all(share == sorted(share) for share in shares)
    assert balance([3], sizes, [0] * 7, 3) == [[3], [], []]
    assert balance([4, 2, 0], sizes, [0] * 7, 1) == [[0, 2, 4]]


def test_of_clients_of_one_size_as_many_as_possible_stay_where_they_are():
    same = torch.full((6,), 5)
    assert balance([0, 1, 2, 3], same, [1, 1, 0, 0, 1, 1], 2) == [[2, 3], [0, 1]]
    assert balance([0, 1, 2, 3], same, [1] * 6, 2) == [[2, 3], [0, 1]]  # two have to go
    assert balance([0, 1, 2], same, [2, 2, 2], 3) == [[1], [2], [0]]
    sizes = torch.tensor([9, 4, 4, 1, 1])  # the first one's size decides where the rest may be
    assert balance([0, 1, 2, 3, 4], sizes, [1, 0, 1, 1, 0], 2) == [[0, 4], [1, 2, 3]]


def test_what_to_plan_for():
    for sampler, low, high in ((Uniform(), 10, 10), (Bernoulli(), 16, 16), (RoundRobin(), 10, 10)):
        sampler.setup(100, 10, torch.ones(100))
        assert low <= expected_clients(sampler) <= high


@pytest.mark.parametrize(
    ("n", "k", "drawn"), [(100, 10, [17, 28, 34, 42, 57, 61, 65, 75, 86, 88]), (10**6, 2, [707819, 970052])]
)
def test_a_seed_draws_the_clients_that_it_always_drew(n, k, drawn):
    """By hand, of the generator's numbers u: the j-th is int(u·(n − k + j + 1)), or n − k + j if that is taken."""
    assert draw_subset(n, k, torch.Generator().manual_seed(0)).tolist() == drawn

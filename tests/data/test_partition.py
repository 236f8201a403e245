"""What every partitioner promises, the laws that each follows, and what each refuses."""

import itertools
import pickle

import numpy as np
import pytest
import torch

import fedlight.data  # registers the partitioners that ship with fedlight
from fedlight.data import IID, DirichletClasses, DirichletClients, NaturalGroups, Partitioner, QuantitySkew, Shards
from fedlight.data.label_skew import _draw_from_pools
from fedlight.data.partition import apportion, categorical, dirichlet, even_sizes, rank_in_group

PARTITIONERS = sorted(
    (p for p in Partitioner.__subclasses__() if p.__module__.startswith("fedlight.")), key=lambda p: p.__name__
)
# (samples, classes, clients): even, odd numbers, as many clients as samples, one client, unequal classes.
CASES = [(600, 10, 20), (607, 7, 12), (40, 4, 40), (30, 2, 1), (0, 0, 8)]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def labels(samples, classes):
    if samples == 0:  # classes 0, 2 and 4 of very different sizes; 1 and 3 are empty
        return torch.repeat_interleave(torch.tensor([0, 2, 4]), torch.tensor([3, 40, 157]))
    return torch.arange(samples) % classes


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("cls", PARTITIONERS, ids=lambda c: c.__name__)
def test_disjoint_complete_and_a_function_of_the_generator(cls, case):
    targets, num_clients = labels(*case[:2]), case[2]
    groups = torch.arange(len(targets)) * 4 // len(targets) if num_clients % 4 == 0 else torch.zeros_like(targets)
    partitioner = cls()
    before = torch.get_rng_state()
    try:
        parts = partitioner(targets, num_clients, rng(), groups)
    except ValueError as error:
        assert "`data." in str(error)  # noqa: PT017 - feasible or an error that names the key; nothing else
        assert case == (40, 4, 40)
        return
    assert len(parts) == num_clients
    assert all(part.dtype == torch.int64 and len(part) > 0 for part in parts)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(targets)))
    again = partitioner(targets, num_clients, rng(), groups)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    assert torch.equal(before, torch.get_rng_state())
    if 1 < num_clients < len(targets):
        other = partitioner(targets, num_clients, rng(1), groups)
        assert any(not torch.equal(a, b) for a, b in zip(parts, other, strict=True))


@pytest.mark.parametrize("cls", PARTITIONERS, ids=lambda c: c.__name__)
def test_more_clients_than_samples_is_an_error(cls):
    targets = torch.zeros(5, dtype=torch.int64)
    for num_clients in (6, 0, -1):
        with pytest.raises(ValueError, match=r"`data\.num_clients` is"):
            cls()(targets, num_clients, rng(), targets)


@pytest.mark.parametrize("cls", PARTITIONERS, ids=lambda c: c.__name__)
def test_targets_are_class_labels(cls):
    for targets in (torch.rand(5), torch.zeros(5, 2, dtype=torch.int64), torch.tensor([0, -1])):
        with pytest.raises(ValueError, match="class labels"):
            cls()(targets, 1, rng())


@pytest.mark.parametrize("cls", PARTITIONERS, ids=lambda c: c.__name__)
def test_survives_pickle(cls):
    assert repr(pickle.loads(pickle.dumps(cls()))) == repr(cls())


def test_a_partitioner_that_forgets_a_sample_is_caught():
    class Forgetful(Partitioner):
        def split(self, targets, num_clients, generator, groups):
            return [torch.tensor([0]), torch.tensor([1])]

    with pytest.raises(ValueError, match="Forgetful does not give every sample"):
        Forgetful()(torch.zeros(3, dtype=torch.int64), 2, rng())


def test_rows_may_be_lists_or_arrays():
    class Halves(Partitioner):
        def split(self, targets, num_clients, generator, groups):
            return [[0, 2], np.array([1, 3])]

    parts = Halves()(torch.zeros(4, dtype=torch.int64), 2, rng())
    assert [part.tolist() for part in parts] == [[0, 2], [1, 3]]


def test_a_partitioner_that_leaves_a_client_empty_is_caught():
    class Greedy(Partitioner):
        def split(self, targets, num_clients, generator, groups):
            return [torch.arange(len(targets)), torch.tensor([], dtype=torch.int64)]

    with pytest.raises(ValueError, match="Greedy makes 2 parts, and `data.num_clients` is 1"):
        Greedy()(torch.zeros(3, dtype=torch.int64), 1, rng())
    with pytest.raises(ValueError, match="Greedy leaves client 1 of 2 without a sample"):
        Greedy()(torch.zeros(3, dtype=torch.int64), 2, rng())


def counts(parts, targets):
    classes = int(targets.max()) + 1
    return torch.stack([torch.bincount(targets[part], minlength=classes) for part in parts])


def test_iid_gives_the_same_number_of_every_class():
    targets = labels(600, 10)
    assert (counts(IID()(targets, 20, rng()), targets) == 3).all()
    uneven = counts(IID()(labels(607, 7), 12, rng()), labels(607, 7))
    assert (uneven.max(0).values - uneven.min(0).values <= 1).all()
    assert uneven.sum(1).max() - uneven.sum(1).min() <= 1


@pytest.mark.parametrize("alpha", [1e-5, 0.01, 0.3, 100.0])
@pytest.mark.parametrize("num_clients", [1, 7, 100])
def test_dirichlet_clients_have_equal_sizes_whatever_alpha(alpha, num_clients):
    parts = DirichletClients(alpha)(labels(1000, 10), num_clients, rng())
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_dirichlet_clients_are_as_skewed_as_the_law_says():
    # Long before a pool is empty the share of a class has the variance of a Dirichlet component plus that of counting;
    # the pools' ends only reduce it. So Σ_c E[share²] = Σ_c (var + 1/C²) is met from below, and ordered in alpha.
    targets, classes = labels(20_000, 10), 10
    got = {}
    for alpha in (0.1, 0.3, 1.0, 1000.0):
        share = counts(DirichletClients(alpha)(targets, 200, rng()), targets) / 100
        got[alpha] = share.square().sum(1).mean().item()
        variance = (classes - 1) / (classes**2 * (classes * alpha + 1))
        expected = classes * (variance + 1 / classes**2)
        expected += (1 - expected) / 100
        assert got[alpha] == pytest.approx(expected, rel=0.15)
    assert got[0.1] > got[0.3] > got[1.0] > got[1000.0]


def exact_law(prior, places, counts):
    """Probability of every sequence of labels when places draw one after the other from what is left."""
    law = {}
    for sequence in itertools.product(range(len(counts)), repeat=len(places)):
        left, probability = list(counts), 1.0
        for place, label in zip(places, sequence, strict=True):
            mass = sum(prior[place][c] for c in range(len(left)) if left[c])
            if mass == 0:
                probability *= left[label] / sum(left)
            else:
                probability *= prior[place][label] / mass if left[label] else 0.0
            left[label] -= 1
            if probability == 0:
                break
        if probability:
            law[sequence] = probability
    return law


def test_drawing_all_at_once_follows_the_law_of_drawing_one_by_one():
    prior, places, pool = [[0.7, 0.2, 0.1], [0.1, 0.0, 0.9], [1.0, 0.0, 0.0]], [0, 1, 2, 0, 2], [2, 2, 1]
    law = exact_law(prior, places, pool)
    assert sum(law.values()) == pytest.approx(1)
    n, generator = 4_000, rng()
    prior_t, places_t, pool_t = torch.tensor(prior, dtype=torch.float64), torch.tensor(places), torch.tensor(pool)
    seen = dict.fromkeys(law, 0)
    for _ in range(n):
        seen[tuple(_draw_from_pools(prior_t, places_t, pool_t, generator).tolist())] += 1
    for sequence, probability in law.items():
        sigma = (probability * (1 - probability) / n) ** 0.5
        assert abs(seen[sequence] / n - probability) < 5 * sigma


def test_dirichlet_classes_cuts_the_first_class_by_the_law():
    # The first class sees no cap, so its shares are Dirichlet: E[Σ share²] = (α + 1) / (N·α + 1).
    targets, num_clients, alpha = labels(4000, 2), 8, 0.5
    squares = []
    for seed in range(200):
        parts = DirichletClasses(alpha)(targets, num_clients, rng(seed))
        squares.append((counts(parts, targets)[:, 0] / 2000).square().sum())
    # Draws with an empty client are repeated, which hardly matters here.
    assert torch.stack(squares).mean().item() == pytest.approx((alpha + 1) / (num_clients * alpha + 1), rel=0.1)


def test_dirichlet_classes_keeps_the_minimum_size():
    sizes = [len(part) for part in DirichletClasses(0.2, min_size=10)(labels(600, 10), 20, rng())]
    assert min(sizes) >= 10
    assert max(sizes) > min(sizes)


def test_dirichlet_classes_gives_up_and_says_so():
    with pytest.raises(ValueError, match=r"`data\.partitioner\.min_size` is 29, but in 5 draws .* at best"):
        DirichletClasses(0.01, min_size=29, max_tries=5)(labels(600, 10), 20, rng())
    with pytest.raises(ValueError, match="had 0 at best. Fewer clients"):  # no smaller min_size helps
        DirichletClasses(0.01, min_size=1, max_tries=2)(labels(600, 10), 500, rng())


@pytest.mark.parametrize("cls", [DirichletClasses, QuantitySkew])
def test_a_minimum_that_cannot_be_met_is_refused_at_once(cls):
    with pytest.raises(
        ValueError, match=r"`data\.partitioner\.min_size` is 31, but 20 clients .* 620, and there are 600"
    ):
        cls(min_size=31)(labels(600, 10), 20, rng())


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_shards_give_each_client_k_classes(k, seed):
    targets = labels(600, 10)
    table = counts(Shards(k)(targets, 20, rng(seed)), targets)
    assert (table > 0).sum(1).tolist() == [k] * 20
    assert table.sum(1).tolist() == [30] * 20


def test_shards_of_unequal_classes_never_exceed_k():
    targets = labels(0, 0)
    table = counts(Shards(2)(targets, 8, rng()), targets)
    assert ((table > 0).sum(1) <= 2).all()


def test_shards_that_cannot_hold_all_classes_or_have_no_samples():
    with pytest.raises(
        ValueError, match=r"`data\.partitioner\.classes_per_client` is 1: 4 clients hold at most 4 classes"
    ):
        Shards(1)(labels(100, 10), 4, rng())
    with pytest.raises(ValueError, match=r"`data\.partitioner\.classes_per_client` is 3: 40 clients need 120 shards"):
        Shards(3)(labels(100, 10), 40, rng())


def test_quantity_skew_has_log_normal_sizes():
    sigma, num_clients = 0.8, 400
    sizes = torch.tensor([len(p) for p in QuantitySkew(sigma)(labels(200_000, 10), num_clients, rng())]).double()
    logarithms = sizes.log()
    assert logarithms.std().item() == pytest.approx(sigma, rel=0.1)
    centred = (logarithms - logarithms.mean()) / logarithms.std()
    assert abs(centred.pow(3).mean().item()) < 0.4  # symmetric in the logarithm
    equal = [len(p) for p in QuantitySkew(0.0)(labels(607, 7), 12, rng())]
    assert max(equal) - min(equal) <= 1


def test_quantity_skew_keeps_the_minimum_size():
    sizes = [len(p) for p in QuantitySkew(3.0, min_size=20)(labels(600, 10), 20, rng())]
    assert min(sizes) == 20
    assert sum(sizes) == 600


def test_natural_groups_are_clients():
    groups = torch.tensor([7, 3, 7, 7, 3, 9, 9, 9, 3, 7])
    targets = torch.zeros(10, dtype=torch.int64)
    one_each = NaturalGroups()(targets, 3, rng(), groups)
    assert [part.sort().values.tolist() for part in one_each] == [[1, 4, 8], [0, 2, 3, 9], [5, 6, 7]]
    two_each = NaturalGroups()(targets, 6, rng(), groups)
    assert [set(groups[part].tolist()) for part in two_each] == [{3}, {3}, {7}, {7}, {9}, {9}]
    assert [len(part) for part in two_each] == [2, 1, 2, 2, 2, 1]


@pytest.mark.parametrize(
    ("num_clients", "groups", "message"),
    [
        (2, None, "NaturalGroups` needs groups"),
        (3, [0, 0, 1, 1, 1], r"`data\.num_clients` is 3, but the data has 2 groups"),
        (4, [0, 1, 1, 1, 1], "smallest group has only 1 samples"),
    ],
)
def test_natural_groups_that_cannot_be(num_clients, groups, message):
    with pytest.raises(ValueError, match=message):
        NaturalGroups()(torch.zeros(5, dtype=torch.int64), num_clients, rng(), groups and torch.tensor(groups))


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: DirichletClients(0.0), "alpha"),
        (lambda: DirichletClients(float("nan")), "alpha"),
        (lambda: DirichletClasses(-1.0), "alpha"),
        (lambda: DirichletClasses(min_size=0), "min_size"),
        (lambda: DirichletClasses(max_tries=0), "max_tries"),
        (lambda: Shards(0), "classes_per_client"),
        (lambda: QuantitySkew(-0.5), "sigma"),
        (lambda: QuantitySkew(float("nan")), "sigma"),
    ],
)
def test_bad_settings_name_their_key(make, key):
    with pytest.raises(ValueError, match=rf"`data\.partitioner\.{key}`"):
        make()


# ---- the draws that partitions are made of


@pytest.mark.parametrize("alpha", [0.3, 1.0, 5.0])
def test_dirichlet_has_the_right_moments(alpha):
    columns, rows = 4, 40_000
    draws = dirichlet(alpha, rows, columns, rng())
    torch.testing.assert_close(draws.sum(1), torch.ones(rows, dtype=torch.float64))
    variance = (columns - 1) / (columns**2 * (columns * alpha + 1))
    assert draws.mean(0).sub(0.25).abs().max() < 0.01
    assert draws.var(0).sub(variance).abs().max() < 0.01
    covariance = torch.cov(draws.T)[0, 1].item()
    assert covariance == pytest.approx(-variance / (columns - 1), abs=0.003)


def test_dirichlet_of_tiny_alpha_is_one_hot_and_not_nan():
    draws = dirichlet(1e-8, 3000, 5, rng())
    assert draws.isfinite().all()
    torch.testing.assert_close(draws.max(1).values, torch.ones(3000, dtype=torch.float64))
    assert torch.bincount(draws.argmax(1), minlength=5).sub(600).abs().max() < 120


def test_categorical_follows_its_row_and_never_gives_zero_probability():
    probabilities = torch.tensor([[0.0, 0.2, 0.0, 0.8, 0.0], [3.0, 0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    rows = torch.arange(40_000) % 2
    draws = categorical(probabilities, rows, rng())
    for row, expected in ((0, [0, 0.2, 0, 0.8, 0]), (1, [0.75, 0, 0, 0, 0.25])):
        frequency = torch.bincount(draws[rows == row], minlength=5) / 20_000
        assert ((frequency > 0) == (torch.tensor(expected) > 0)).all()
        torch.testing.assert_close(frequency, torch.tensor(expected), rtol=0, atol=0.015)


def test_integer_shares():
    assert even_sizes(11, 4).tolist() == [3, 3, 3, 2]
    assert apportion(10, torch.tensor([1.0, 1.0, 1.0])).tolist() == [4, 3, 3]
    assert apportion(7, torch.tensor([0.0, 6.0, 1.0])).tolist() == [0, 6, 1]
    assert apportion(4, torch.tensor([5.0, 2.0, 1.0])).tolist() == [3, 1, 0]  # ideally 2.5, 1, 0.5: the first wins
    assert rank_in_group(torch.tensor([3, 1, 3, 3, 1])).tolist() == [0, 0, 1, 2, 1]


def test_the_package_exports_every_partitioner():
    assert {p.__name__ for p in PARTITIONERS} <= set(fedlight.data.__all__)

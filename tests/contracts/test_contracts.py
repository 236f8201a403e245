"""What every algorithm must do, whatever it is combined with. New plugins are found by themselves."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.perturbations import SAM
from fedlight.trainer import FederatedTrainer
from tests.contracts.combinations import ALGORITHMS, ROUNDS, SIZES, Clients, combinations, model_for, outcome, run
from tests.helpers.pair import in_pair

COMBINATIONS = combinations()

every_combination = pytest.mark.parametrize(
    "combination",
    [pytest.param(c, marks=() if c.quick else pytest.mark.slow, id=str(c)) for c in COMBINATIONS],
)

with_some = pytest.mark.parametrize(
    "combination",
    [pytest.param(c, marks=() if c.quick and c.alone else pytest.mark.slow, id=str(c)) for c in COMBINATIONS],
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Two processes have one thread each; the same number of threads gives the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Two rounds of every combination in one process, run when first asked for."""
    root, done = tmp_path_factory.mktemp("uninterrupted"), {}

    def get(combination):
        if combination not in done:
            trainer, model, data = run(combination, root)
            done[combination] = (outcome(trainer), data.loss(model_for(combination)), data.loss(model), data.asked)
        return done[combination]

    return get


@pytest.fixture(scope="module")
def in_two_processes(request, tmp_path_factory):
    """The outcomes of the combinations that are tested in each process of one pair."""
    folder, test = tmp_path_factory.mktemp("pair"), "test_two_processes_give_the_same_bits_as_one"
    tested = [item for item in request.session.items if getattr(item, "originalname", None) == test]
    names = sorted({str(item.callspec.params["combination"]) for item in tested if "combination" in item.fixturenames})
    return in_pair("tests.contracts.two_processes", folder, *names)


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def sampled_clients(state):
    return {int(name.split("/")[1]) for name in state if name.startswith("client/")}


@every_combination
def test_two_rounds_improve_a_convex_problem(combination, uninterrupted):
    state, before, after, _ = uninterrupted(combination)
    assert after < before
    assert all(torch.isfinite(value).all() for value in state.values())


@every_combination
def test_a_client_that_is_never_sampled_has_no_state(combination, uninterrupted):
    state, _, _, asked = uninterrupted(combination)
    assert sampled_clients(state) == {client for clients in ROUNDS for client in clients}
    assert asked == {client for clients in ROUNDS for client in clients}


@every_combination
def test_resuming_gives_the_same_bits(combination, uninterrupted, tmp_path):
    first, _, _ = run(combination, tmp_path, max_rounds=1, enable_checkpointing=True)
    checkpoint = first.run_dir / "checkpoints" / "last.ckpt"
    resumed, _, _ = run(combination, tmp_path, ckpt_path=checkpoint)
    assert_same_bits(outcome(resumed), uninterrupted(combination)[0])


@every_combination
def test_two_processes_give_the_same_bits_as_one(combination, uninterrupted, in_two_processes):
    first, second = (found[str(combination)] for found in in_two_processes)
    assert not sampled_clients(first) & sampled_clients(second)  # a client's row is in one of them
    assert_same_bits({k: v for k, v in first.items() if k in second}, {k: v for k, v in second.items() if k in first})
    assert_same_bits(first | second, uninterrupted(combination)[0])


@every_combination
def test_double_precision_differs_by_rounding(combination, uninterrupted, tmp_path):
    found, expected = outcome(run(combination, tmp_path, precision="64-true")[0]), uninterrupted(combination)[0]
    assert found.keys() == expected.keys()
    assert {found[k].dtype for k in found if k.endswith("params")} == {torch.float64}
    for name, value in expected.items():
        torch.testing.assert_close(found[name].to(value.dtype), value, rtol=1e-3, atol=1e-5)


@with_some
def test_all_clients_and_then_one(combination, tmp_path):
    """K = N in the first round, one client in the second; the clients have unequal sizes throughout."""
    trainer, _, _ = run(combination, tmp_path, rounds=(tuple(range(len(SIZES))), (2,)))
    state = outcome(trainer)
    assert sampled_clients(state) == set(range(len(SIZES)))
    assert all(torch.isfinite(value).all() for value in state.values())


@with_some
def test_a_thousand_clients_cost_what_the_sampled_ones_cost(combination, tmp_path):
    data = Clients((2,) * 1000)
    trainer, _, _ = run(combination, tmp_path, data, rounds=((3, 997), (3, 500)), local_steps=1)
    state = outcome(trainer)
    assert sampled_clients(state) == {3, 500, 997}
    assert data.asked <= {0, 3, 500, 997}  # client 0 for a look at the data before training
    assert all(torch.isfinite(value).all() for value in state.values())


OWN = [name for name, cls in ALGORITHMS.items() if cls().perturbation is not None]


@pytest.mark.parametrize("name", OWN)
def test_a_second_perturbation_is_refused(name):
    own = type(ALGORITHMS[name]().perturbation).__name__
    with pytest.raises(MisconfigurationException, match=rf"perturbation: {name} brings its own {own}, so SAM cannot"):
        FederatedTrainer(algorithm=ALGORITHMS[name](), perturbation=SAM())


def test_the_table_is_complete():
    algorithms = len(ALGORITHMS)
    assert len(COMBINATIONS) == 2 * (3 * (algorithms - len(OWN)) + len(OWN))
    assert {"FedAvg", "SCAFFOLD", "FedDyn", "FedSAM"} <= set(ALGORITHMS)

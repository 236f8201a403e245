"""State that steps move besides trained parameters belongs to the round, whoever trains before or beside."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.engines.cuda_graph.engine import CudaGraph
from fedlight.run.loggers import read_metrics
from tests.contracts.moving import MODULES, run
from tests.contracts.test_contracts import _one_thread, assert_same_bits  # noqa: F401
from tests.engines.tape import Tape
from tests.helpers.pair import in_pair

every_module = pytest.mark.parametrize("name", MODULES)
THREE = ((0, 2, 3), (1, 3), (2, 0))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    root, done = tmp_path_factory.mktemp("one"), {}

    def get(name):
        if name not in done:
            done[name] = run(name, root)
        return done[name]

    return get


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory):
    return in_pair("tests.contracts.moving", tmp_path_factory.mktemp("pair"))


@every_module
@pytest.mark.slow
def test_two_processes_give_the_same_bits_as_one(name, one_process, in_two_processes):
    first, second = (found[name] for found in in_two_processes)
    assert all(torch.equal(first[k], second[k]) for k in first.keys() & second.keys())
    assert not {k for k in first.keys() & second.keys() if k.startswith("client/")}  # each row is kept once
    assert_same_bits({**first, **second}, one_process(name)[2])


@every_module
def test_resuming_gives_the_same_bits(name, tmp_path):
    whole = run(name, tmp_path, rounds=THREE)[2]
    for rounds in (1, 2):
        first, _, _ = run(name, tmp_path, max_rounds=rounds, rounds=THREE, enable_checkpointing=True)
        checkpoint = first.run_dir / "checkpoints" / "last.ckpt"
        assert_same_bits(run(name, tmp_path, checkpoint, THREE)[2], whole)
    if name == "LateTeacher":  # at the resume a trial step finds what moves, without one the round itself
        resumed, whole = (read_metrics(tmp_path / name / f"version_{i}" / "metrics.csv") for i in (1, 0))
        assert [row["comm/up_mb"] for row in resumed] == [row["comm/up_mb"] for row in whole]
        assert [row["comm/down_mb"] for row in resumed] == [row["comm/down_mb"] for row in whole]
        assert whole[0]["comm/up_mb"] / 3 < whole[1]["comm/up_mb"] / 2 == whole[2]["comm/up_mb"] / 2


@every_module
def test_the_order_of_the_clients_changes_nothing(name, one_process, tmp_path, monkeypatch):
    from fedlight.engines.eager import Eager

    train = Eager.train
    monkeypatch.setattr(Eager, "train", lambda self, round, tasks: train(self, round, list(tasks)[::-1]))
    assert_same_bits(run(name, tmp_path)[2], one_process(name)[2])


@every_module
@pytest.mark.parametrize("engine", ["vmap", "cuda_graph"])
def test_other_engines_agree_or_say_what_they_cannot_do(name, engine, one_process, tmp_path):
    replaces = "puts another tensor in the place of {}".format
    refused = {
        "Hidden": "changes self.hidden",
        "Outputs": "changes self.outputs",
        "Counter": "changes self.steps",
        "LateTeacher": "reads trainer.current_epoch",
        "HookTeacher": "overrides on_train_batch_end",
        "ReboundTeacher": "directly with `.data`" if engine == "vmap" else replaces("teacher.weight"),
        "Queue": None if engine == "vmap" else replaces("queue"),
    }.get(name)
    made = CudaGraph(slots=2, recorder=Tape) if engine == "cuda_graph" else engine
    if refused is not None:
        with pytest.raises(MisconfigurationException, match=f"(?s)trainer.engine={engine}: .*{refused}"):
            run(name, tmp_path, engine=made)
        return
    found = run(name, tmp_path, engine=made)[2]
    expected = run(name, tmp_path, engine="eager")[2]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Teacher", "DataTeacher", "ReboundTeacher", "HookTeacher"])
def test_a_teacher_follows_the_buffers(name, one_process, tmp_path):
    """Weights: 15 parameters; with the teacher's, twice as much goes up and down."""
    trainer, module, _ = one_process(name)
    state = trainer._session.federation.state
    assert set(state.buffers) == {"teacher.weight", "teacher.bias"}
    assert not torch.equal(state.buffers["teacher.weight"], MODULES[name]().teacher.weight)
    assert torch.equal(module.teacher.weight, state.buffers["teacher.weight"])
    assert float(trainer.callback_metrics["comm/up_mb"]) == pytest.approx(2 * 2 * 15 * 4 / 1e6)
    reset = run(name, tmp_path, buffers="reset", rounds=((2,), (2,)))[2]
    once = run(name, tmp_path, buffers="reset", rounds=((2,),))[2]
    average = run(name, tmp_path, rounds=((2,), (2,)))[2]
    assert not torch.equal(reset["server/params"], average["server/params"])
    assert not torch.equal(reset["buffers/teacher.bias"], once["buffers/teacher.bias"])  # another student moved it
    local = run(name, tmp_path, buffers="local")[0]._session.federation.store
    assert set(local.get(0, "buffers")) == {"teacher.weight", "teacher.bias"}


def test_frozen_parameters_that_rest_cost_nothing(tmp_path):
    class Rests(MODULES["Teacher"]):
        def move(self):
            pass

    trainer, _, _ = run(Rests, tmp_path)
    assert trainer._session.federation.state.buffers == {}
    assert float(trainer.callback_metrics["comm/up_mb"]) == pytest.approx(2 * 15 * 4 / 1e6)


@pytest.mark.parametrize("kept", ["cpu", "disk"])
def test_what_a_client_moves_late_stays_with_it_wherever_state_is_kept(tmp_path, kept):
    """Rows of the first round lack the teacher that all later ones have."""

    class Late(MODULES["LateTeacher"]):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def training_step(self, batch, batch_idx):
            self.seen += 1
            return super().training_step(batch, batch_idx)

    rounds = ((0, 1, 2), (1, 2), (0, 2))
    trainer, _, found = run(Late, tmp_path, buffers="local", client_state=kept, rounds=rounds)
    store = trainer._session.federation.store
    assert all(set(store.get(i, "buffers")) == {"seen", "teacher.weight", "teacher.bias"} for i in range(3))
    teachers = [store.get(i, "buffers")["teacher.weight"] for i in range(3)]
    assert not any(torch.equal(teachers[i], teachers[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    other = run(Late, tmp_path, buffers="local", client_state="auto", rounds=rounds)[2]
    assert all(torch.equal(found[name], other[name]) for name in other)

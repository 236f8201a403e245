"""What the cuda_graph engine does that needs no GPU: its recordings are replayed by a stand-in, bit for bit."""

from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import optim

import fedlight.algorithms as algorithms
from fedlight.data.arrays import _Storage
from fedlight.engines.client_loop import ClientLoop
from fedlight.engines.cuda_graph.client_loop import RecordedLoop
from fedlight.engines.cuda_graph.engine import MOST_SLOTS, CudaGraph, plan_slots
from fedlight.engines.cuda_graph.recorder import LONGEST, Segment, segments
from fedlight.penalties.man import MAN
from fedlight.personal import PersonalParts
from fedlight.perturbations import ASAM, LESAM, SAM, DualSAM
from fedlight.server.federation import Federation
from fedlight.server.sampling import share
from tests.engines import cases
from tests.engines.tape import Anew, Tape
from tests.helpers.half import scaled  # noqa: F401  (a fixture)

# As on CUDA: fused. A learning rate that float32 has gives the same bits as a number and as a tensor.
SGD = partial(optim.SGD, lr=0.125, fused=True)
MOMENTUM = partial(optim.SGD, lr=0.125, fused=True, momentum=0.9, nesterov=True, weight_decay=0.1)
HALVED = partial(optim.lr_scheduler.ExponentialLR, gamma=0.5)
CASES = {
    "plain": {},
    "float32": {"precision": "32-true"},
    "bf16": {"precision": "bf16-mixed"},
    "equal clients": {"data": {"sizes": cases.EQUAL}},
    "a batch larger than a client": {"data": {"batch_size": 10}},
    "own storage": {"data": {"shared": False}},
    "one client": {"clients_per_round": 1},
    "many steps": {"local_epochs": 11, "data": {"sizes": cases.EQUAL}},
    "man": {"callbacks": [MAN(0.3)]},
    "sam": {"perturbation": SAM(0.1)},
    "asam, man, float32": {"perturbation": ASAM(0.1), "callbacks": [MAN(0.3)], "precision": "32-true"},
    "lesam": {"perturbation": LESAM(0.1)},
    "dual sam, man": {"perturbation": DualSAM(0.1), "callbacks": [MAN(0.3)]},
    "fedprox": {"algorithm": algorithms.FedProx(0.5)},
    "scaffold": {"algorithm": algorithms.SCAFFOLD(), "precision": "32-true"},
    "feddc, sam": {"algorithm": algorithms.FedDC(0.1), "perturbation": SAM(0.1), "precision": "32-true"},
    "fedcm": {"algorithm": algorithms.FedCM(0.3)},
    "momentum": {"net": {"optimizer": MOMENTUM}},
    "adam": {"net": {"optimizer": partial(optim.Adam, lr=0.0078125, fused=True)}},
    "adamw": {"net": {"optimizer": partial(optim.AdamW, lr=0.0078125, amsgrad=True, fused=True)}},
    "groups": {"net": {"optimizer": partial(optim.SGD, lr=0.125, momentum=0.5, fused=True), "groups": True}},
    "local steps": {"local_steps": 5},
    "accumulate": {"accumulate_grad_batches": 2},
    "accumulate, sam": {"accumulate_grad_batches": 2, "perturbation": SAM(0.1), "local_steps": 3},
    "clip": {"gradient_clip_val": 0.2},
    "schedule per step": {"net": {"optimizer": SGD, "scheduler": HALVED, "interval": "step"}},
    "schedule per epoch": {"net": {"optimizer": SGD, "scheduler": HALVED, "interval": "epoch"}},
    "schedule per round": {"net": {"optimizer": SGD, "scheduler": HALVED}, "max_rounds": 3},
    "momentum schedule": {
        "net": {
            "optimizer": MOMENTUM,
            "scheduler": partial(optim.lr_scheduler.CyclicLR, base_lr=0.125, max_lr=0.5, step_size_up=4),
            "interval": "step",
        }
    },
    "batch norm": {"net": {"optimizer": SGD, "norm": True}, "data": {"sizes": (6, 10, 14)}, "clients_per_round": 3},
    "batch norm, sam": {
        "net": {"optimizer": SGD, "norm": True},
        "perturbation": SAM(0.1),
        "data": {"sizes": (8, 8)},
        "clients_per_round": 2,
    },
    "personal parts": {"net": {"optimizer": MOMENTUM}, "personal": PersonalParts("head", "alternating")},
    "dropout": {"net": {"optimizer": SGD, "dropout": 0.5}},
    "dropout, sam": {"net": {"optimizer": SGD, "dropout": 0.5}, "perturbation": SAM(0.1)},
}


def train(root, engine, **settings):
    return cases.train(root, engine, **{"net": {"optimizer": SGD}, **settings})


def assert_same(found, expected):
    assert found[0].keys() == expected[0].keys()
    assert [key for key, value in expected[0].items() if not torch.equal(found[0][key], value)] == []
    assert found[1] == expected[1]


@pytest.mark.parametrize("name", CASES)
def test_replays_equal_the_eager_engine_bit_for_bit(name, tmp_path):
    expected = train(tmp_path, "eager", **CASES[name])
    assert_same(train(tmp_path, CudaGraph(slots=3, recorder=Tape), **CASES[name]), expected)


HALF = {
    "plain": {},
    "sam": {"perturbation": SAM(0.1)},
    "clip, accumulate": {"gradient_clip_val": 0.2, "accumulate_grad_batches": 2},
    "momentum, man": {"net": {"optimizer": MOMENTUM}, "callbacks": [MAN(0.3)]},
    "adam": {"net": {"optimizer": partial(optim.Adam, lr=0.0078125, fused=True)}},
    "three rounds": {"max_rounds": 3},
}


def begin_with_scale(monkeypatch, scale):
    initialise = Federation.initialise

    def with_scale(self, params, buffers):
        initialise(self, params, buffers)
        self.state.loss_scale = scale

    monkeypatch.setattr(Federation, "initialise", with_scale)


@pytest.mark.usefixtures("scaled")
@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("scale", [2.0**10, 2.0**20])
def test_16_mixed_scales_losses_and_skips_steps_as_the_eager_engine_does(name, scale, tmp_path, monkeypatch):
    """With the larger scale the first steps overflow: they are skipped, and the scale falls."""
    begin_with_scale(monkeypatch, scale)
    scales = []

    class Watch(Callback):
        def on_round_end(self, trainer, module):
            scales.append(trainer._session.federation.state.loss_scale)

    settings = {"precision": "32-true", **HALF[name]}
    settings["callbacks"] = [*settings.get("callbacks", []), Watch()]
    expected = train(tmp_path, "eager", **settings)
    assert_same(train(tmp_path, CudaGraph(slots=2, recorder=Tape), **settings), expected)
    half = len(scales) // 2
    assert scales[:half] == scales[half:]
    assert (scales[0] < scale) == (scale > 2**10)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("engine", ["eager", "cuda_graph", "vmap"])
def test_data_that_does_not_fit_on_the_device_changes_nothing(engine, shared, tmp_path, monkeypatch):
    settings = {"data": {"shared": shared}, "perturbation": SAM(0.1)}
    expected = train(tmp_path, "eager", **settings)
    monkeypatch.setattr(_Storage, "fits", lambda self, device: False)
    monkeypatch.setattr(_Storage, "to", lambda self, device: pytest.fail("all of it is copied"))
    made = {"cuda_graph": CudaGraph(slots=2, recorder=Tape)}.get(engine, engine)
    found = train(tmp_path, made, **settings)
    if engine != "vmap":
        assert_same(found, expected)
    else:
        torch.testing.assert_close(found[0], expected[0])


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_slots_and_their_assignment_change_nothing(slots, tmp_path):
    settings = {"perturbation": SAM(0.1), "callbacks": [MAN(0.3)], "net": {"optimizer": MOMENTUM, "dropout": 0.5}}
    expected = train(tmp_path, "eager", **settings)
    assert_same(train(tmp_path, CudaGraph(slots=slots, recorder=Tape), **settings), expected)


def test_work_done_anew_is_the_same(tmp_path):
    settings = {"perturbation": SAM(0.1), "net": {"optimizer": MOMENTUM, "dropout": 0.5}}
    expected = train(tmp_path, "eager", **settings)
    assert_same(train(tmp_path, CudaGraph(recorder=Anew), **settings), expected)


def test_later_rounds_record_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Tape, "recordings", 0)
    counts = {}
    for rounds in (2, 6):
        Tape.recordings = 0
        train(tmp_path, CudaGraph(slots=1, recorder=Tape), max_rounds=rounds)
        counts[rounds] = Tape.recordings
    # Sizes 5, 12, 9, 14 in batches of four, two epochs: runs of one, two, three and six full batches, and last ones of
    # one and two samples: lengths 1, 2 and 4 of full batches, length 1 of the others.
    assert counts == {2: 5, 6: 5}


def test_a_value_that_a_callback_changes_is_not_frozen(tmp_path):
    class Louder(Callback):
        def on_round_start(self, trainer, module):
            man.zeta = 2.0 * trainer.current_round

    man = MAN(0.0)
    settings = {"callbacks": [man, Louder()], "max_rounds": 3}
    expected = train(tmp_path, "eager", **settings)
    man.zeta = 0.0
    assert_same(train(tmp_path, CudaGraph(slots=2, recorder=Tape), **settings), expected)


def test_a_client_that_cannot_be_recorded_is_trained_without(tmp_path):
    class Fails(Tape):
        def record(self, work, warm_up=None):
            if Tape.recordings >= 3:  # those of the client that is tried out first
                raise RuntimeError("capture failed")
            return super().record(work, warm_up)

    expected = train(tmp_path, "eager")
    Tape.recordings = 0
    with pytest.warns(UserWarning, match="is trained without a graph: .*capture failed"):
        found = train(tmp_path, CudaGraph(slots=1, recorder=Fails))
    assert_same(found, expected)


def test_memory_that_runs_out_in_a_late_round_leads_to_eager(tmp_path, monkeypatch):
    """Client 1 cannot be recorded any more and, beside the slots, not be trained either."""
    rounds, fails = 4, []
    prepare, train_one = RecordedLoop.prepare, ClientLoop.train

    def scarce_prepare(self, round, task, fresh=None):
        if round >= 2 and task.client == 1:
            raise torch.OutOfMemoryError("no memory for a graph")
        return prepare(self, round, task, fresh)

    def scarce_train(self, round, task):
        if round >= 2 and not fails:
            fails.append((round, task.client))
            raise torch.OutOfMemoryError("no memory beside the slots")
        return train_one(self, round, task)

    expected = train(tmp_path, "eager", max_rounds=rounds)
    monkeypatch.setattr(RecordedLoop, "prepare", scarce_prepare)
    monkeypatch.setattr(ClientLoop, "train", scarce_train)
    with (
        pytest.warns(UserWarning, match="client 1 is trained without a graph: .*no memory for a graph"),
        pytest.warns(UserWarning, match="device memory ran out in round 3 while client 1 trained without a graph"),
    ):
        found = train(tmp_path, CudaGraph(slots=2, recorder=Tape), max_rounds=rounds)
    assert fails == [(2, 1)]
    assert_same(found, expected)


def test_a_recording_that_fails_at_once_is_an_error(tmp_path):
    class Fails(Tape):
        def record(self, work, warm_up=None):
            raise RuntimeError("capture failed")

    with pytest.raises(MisconfigurationException, match="training_step of Net cannot be recorded .*capture failed"):
        train(tmp_path, CudaGraph(recorder=Fails))


def test_too_little_memory_makes_fewer_slots(tmp_path):
    class Scarce(Tape):
        def record(self, work, warm_up=None):
            if Tape.recordings >= 3:
                raise torch.OutOfMemoryError("no memory")
            return super().record(work, warm_up)

    settings = {"data": {"sizes": cases.EQUAL}}
    expected = train(tmp_path, "eager", **settings)
    Tape.recordings = 0
    with pytest.warns(UserWarning, match="device memory suffices for 3 slots"):
        found = train(tmp_path, CudaGraph(slots=4, recorder=Scarce), **settings)
    assert_same(found, expected)


def test_it_needs_a_gpu(tmp_path):
    with pytest.raises(MisconfigurationException, match="needs a CUDA device, and trainer.accelerator gives cpu"):
        train(tmp_path, "cuda_graph")


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (partial(optim.RMSprop, lr=0.1), "a step of RMSprop cannot be recorded; those of SGD, Adam, AdamW can"),
        (partial(optim.SGD, lr=0.1, momentum=0.9, dampening=0.1), "dampening"),
    ],
)
def test_optimizers_that_cannot_be_recorded_are_refused(optimizer, message, tmp_path):
    with pytest.raises(MisconfigurationException, match=message):
        train(tmp_path, CudaGraph(recorder=Tape), net={"optimizer": optimizer})


def test_what_changes_from_step_to_step_is_named(tmp_path, monkeypatch):
    class Counts(cases.Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (1 + batch_idx % 2)

    monkeypatch.setattr(cases, "Net", Counts)
    with pytest.raises(MisconfigurationException, match="Counts.training_step reads batch_idx"):
        train(tmp_path, CudaGraph(recorder=Tape))


class Marked(cases.Net):
    """Its optimizer goes by attributes of parameters."""

    def __init__(self, **settings):
        super().__init__(**settings)
        for parameter in self.parameters():
            parameter.decay = 0.5 * (parameter.ndim - 1)

    def configure_optimizers(self):
        groups = [{"params": [p], "weight_decay": getattr(p, "decay", 0.0)} for p in self.parameters()]
        return optim.SGD(groups, lr=0.125, fused=True)


def test_slots_know_what_parameters_are_marked_with(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "Net", Marked)
    assert_same(train(tmp_path, CudaGraph(slots=2, recorder=Tape)), train(tmp_path, "eager"))


def hooked(net):
    net.fc2.weight.register_hook(lambda gradient: gradient / 10)


def closed(net):
    net.fc2.register_forward_hook(lambda layer, given, out: out * net.fc2.weight.mean())


REFUSED = {hooked: "parameter fc2.weight has a hook", closed: "uses its parameter fc2.weight, also in a copy"}


@pytest.mark.parametrize("change", REFUSED)
def test_what_a_slots_copy_of_the_module_would_do_otherwise_is_refused(change, tmp_path, monkeypatch):
    class Changed(cases.Net):
        def __init__(self, **settings):
            super().__init__(**settings)
            change(self)

    monkeypatch.setattr(cases, "Net", Changed)
    with pytest.raises(MisconfigurationException, match=f"engine=cuda_graph: .*{REFUSED[change]}"):
        train(tmp_path, CudaGraph(recorder=Tape))


def test_auto_says_why_it_is_eager(tmp_path, monkeypatch):
    monkeypatch.setattr("fedlight.engines._accelerated", lambda device: True)
    with pytest.warns(UserWarning, match="engine=auto is eager, which is slower, because of .*needs a CUDA device"):
        found = train(tmp_path, "auto")
    assert_same(found, train(tmp_path, "eager"))


def test_segments_are_powers_of_two_of_equal_steps():
    one, other = ({"lr": 0.1},), ({"lr": 0.2},)
    steps = [(0, (4,)), (4, (4,)), (8, (4,)), (12, (2,)), (14, (4,)), (18, (4,))]
    found = segments(steps, [one, one, one, one, one, other])
    assert found == [
        Segment(0, (4,), 2, one),
        Segment(8, (4,), 1, one),
        Segment(12, (2,), 1, one),
        Segment(14, (4,), 1, one),
        Segment(18, (4,), 1, other),
    ]
    long = segments([(3 * i, (1, 2)) for i in range(75)], [one] * 75)
    assert [s.steps for s in long] == [LONGEST, LONGEST, 8, 2, 1]
    assert [s.begin for s in long] == [0, 96, 192, 216, 222]


def test_slots_are_planned_from_memory_and_clients():
    assert plan_slots(clients=10, free=10**9, each=10**6) == 9
    assert plan_slots(clients=1, free=10**9, each=10**6) == 0
    assert plan_slots(clients=10, free=3 * 10**6, each=10**6) == 2
    assert plan_slots(clients=10, free=0, each=10**6) == 0
    assert plan_slots(clients=1000, free=10**12, each=1) == MOST_SLOTS - 1


def test_clients_are_shared_by_size():
    assert share([5, 12, 9, 14], 2) == [[3, 0], [1, 2]]
    assert share([1, 1], 3) == [[0], [1], []]
    assert share([], 2) == [[], []]

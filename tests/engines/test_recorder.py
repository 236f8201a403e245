"""What the recorder asks of CUDA, with a stand-in for CUDA."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fedlight.engines.cuda_graph.recorder import Recorder
from tests.engines.tape import Anew


class FakeGenerator:
    def __init__(self, state="default"):
        self.state = state

    def clone_state(self):
        return FakeGenerator(object())

    def graphsafe_get_state(self):
        return FakeGenerator(self.state)

    def graphsafe_set_state(self, other):
        self.state = other.state

    def manual_seed(self, seed):
        self.seed = seed


@pytest.fixture
def cuda(monkeypatch):
    """A torch.cuda that notes what happens: ``events`` of (what, on which stream, with which random state)."""
    default, events, current = FakeGenerator(), [], ["main"]

    @contextmanager
    def stream(s):
        before = list(current)
        current.append(s)
        try:
            yield
        finally:
            current[:] = before

    class Graph:
        def pool(self):
            return "pool of its own" if self.given is None else self.given

        def replay(self):
            events.append(("replay", current[-1], default.state))

    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        graph.given = pool
        events.append(("capture", stream, default.state, pool, capture_error_mode))
        current.append(stream)
        yield
        current.pop()  # torch's own does not come to this where the capture has failed

    class Stream:
        def __init__(self, device):
            self.waits = []

        def synchronize(self):
            events.append(("synchronize", self))

        def wait_stream(self, other):
            self.waits.append(other)

    main = Stream(None)
    for name, value in {
        "Stream": Stream,
        "stream": stream,
        "CUDAGraph": Graph,
        "graph": capture,
        "synchronize": lambda device: None,
        "current_stream": lambda device: main,
        "default_generators": [default],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return SimpleNamespace(events=events, main=main, default=default, current=current)


def test_a_slot_warms_up_and_captures_on_a_stream_and_a_random_state_of_its_own(cuda):
    recorder, other = (Recorder(torch.device("cuda", 0)) for _ in range(2))
    seen = []
    replay = recorder.record(lambda: seen.append((cuda.current[-1], cuda.default.state)))
    stream, state = seen[0]
    assert seen == [(stream, state)] * (Recorder.WARM_UPS + 1)
    assert stream is recorder._stream is not other._stream
    assert state is recorder._generator.state is not other._generator.state
    assert cuda.events == [("synchronize", stream), ("capture", stream, state, None, "thread_local")]
    assert cuda.default.state == "default"
    with recorder.ordered():
        replay()
    assert cuda.events[-1] == ("replay", stream, "default")  # the graph has captured its own state


def test_less_work_can_warm_up(cuda):
    done = []
    Recorder(torch.device("cuda", 0)).record(lambda: done.append("all"), lambda: done.append("a step"))
    assert done == ["a step"] * Recorder.WARM_UPS + ["all"]


def test_recordings_of_a_slot_share_its_memory(cuda):
    recorder = Recorder(torch.device("cuda", 0))
    recorder.record(lambda: None)
    recorder.record(lambda: None)
    assert [event[3] for event in cuda.events if event[0] == "capture"] == [None, "pool of its own"]


def test_a_failed_capture_gives_stream_and_random_state_back(cuda):
    def fails():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        Recorder(torch.device("cuda", 0)).record(fails, lambda: None)
    assert cuda.default.state == "default"
    assert cuda.current == ["main"]


def test_streams_wait_for_each_other(cuda):
    recorder = Recorder(torch.device("cuda", 0))
    recorder.begin()
    assert recorder._stream.waits == [cuda.main]
    recorder.end()
    assert cuda.main.waits == [recorder._stream]


def test_seeding_is_the_slots_own(cuda):
    recorder = Recorder(torch.device("cuda", 0))
    recorder.seed(7)
    assert recorder._generator.seed == 7
    assert not hasattr(cuda.default, "seed")


def test_work_done_anew_draws_the_numbers_of_its_seed():
    one, other, drawn = Anew(torch.device("cpu")), Anew(torch.device("cpu")), []
    replays = [r.record(lambda: drawn.append(torch.rand(()))) for r in (one, other)]
    drawn.clear()
    before = torch.get_rng_state()
    one.seed(1)
    other.seed(1)
    for replay in (replays[0], replays[1], replays[1], replays[0]):  # in any order
        replay()
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]
    assert torch.equal(torch.get_rng_state(), before)

"""Clients' rows travel, are kept once, and stream into checkpoints and back."""

import errno
import gc
import io
import queue
import random
import threading
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.algorithms import SCAFFOLD
from fedlight.run import snapshot
from fedlight.run.checkpoint import load_checkpoint, save_checkpoint
from fedlight.server import rows
from fedlight.server.clients import ClientStore, DiskClientStore
from fedlight.server.rows import ClientRows, SavedRows
from tests.helpers.tiny import Clients, Regression, quiet_trainer, seeded

N = 17


def row(client, time=0):
    """Of several data types and shapes; every third client has a tensor and a part more."""
    state = {"h": seeded(3, 2, seed=100 * client + time), "count": torch.tensor(time)}
    if client % 3:
        return {"algorithm": state}
    return {"algorithm": {**state, "none": torch.zeros(0)}, "latest": {"params": state["h"].bfloat16()}}


def same(one, other):
    assert one.keys() == other.keys()
    for part, state in one.items():
        assert state.keys() == other[part].keys()
        for name, value in state.items():
            assert torch.equal(value, other[part][name])
            assert value.dtype == other[part][name].dtype
    return True


def content(pairs):
    return {"fedlight": {"format": 2, "clients": {"where": "memory", "rows": pairs}}, "other": torch.ones(2)}


@pytest.mark.parametrize(("block", "blocks"), [(1, 6), (40, 5), (2**24, 3)])
def test_rows_in_a_checkpoint_come_back_and_torch_reads_the_rest(tmp_path, monkeypatch, block, blocks):
    monkeypatch.setattr(rows, "_BLOCK_BYTES", block)
    path, pairs = tmp_path / "a.ckpt", [(i, row(i)) for i in (5, 3, 6, 9, 2, 4)]
    save_checkpoint(path, content(iter(pairs)))
    found = load_checkpoint(path)["fedlight"]["clients"]["rows"]
    for _ in range(2):  # as often as one likes
        assert [i for i, _ in found] == [5, 3, 6, 9, 2, 4]
        assert all(same(read, dict(pairs)[i]) for i, read in found)
    assert torch.load(path, weights_only=True)["other"].tolist() == [1, 1]
    save_checkpoint(tmp_path / "b.ckpt", load_checkpoint(path))
    assert [i for i, _ in SavedRows(tmp_path / "b.ckpt")] == [5, 3, 6, 9, 2, 4]
    with zipfile.ZipFile(path) as entries:
        assert sum("/rows/" in name for name in entries.namelist()) == 1 + blocks


def test_no_more_rows_are_in_memory_than_a_block_has(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 4 * 4000)
    alive, most = set(), []

    def made():
        for i in range(100):
            value = torch.full((1000,), float(i))
            alive.add(i)
            weakref.finalize(value, alive.discard, i)
            most.append(len(alive))
            yield i, {"latest": {"params": value}}

    save_checkpoint(tmp_path / "a.ckpt", content(made()))
    gc.collect()
    assert max(most) <= 10
    assert [float(read["latest"]["params"][0]) for _, read in SavedRows(tmp_path / "a.ckpt")] == list(range(100))


def test_a_checkpoint_that_was_written_again_without_its_rows_is_refused(tmp_path):
    trainer = quiet_trainer(tmp_path, algorithm=SCAFFOLD(), max_rounds=1)
    trainer.fit(Regression(), Clients())
    path = trainer.run_dir / "checkpoints" / "last.ckpt"
    torch.save(torch.load(path, weights_only=True), path)
    with pytest.raises(ValueError, match="has lost its clients' rows. Take another checkpoint"):
        quiet_trainer(tmp_path, algorithm=SCAFFOLD()).fit(Regression(), Clients(), ckpt_path="last")
    assert quiet_trainer(tmp_path).test(Regression(), Clients(), ckpt_path="last", verbose=False)


class Wires:
    """Stands for torch.distributed: a thread is a process, and a message is sent when it has been received."""

    def __init__(self, world):
        self.here, self.barrier = threading.local(), threading.Barrier(world, timeout=20)
        self.wires, self.gathered = {}, [None] * world
        self.lock, self.sent = threading.Lock(), []

    def wire(self, *ends):
        with self.lock:
            return self.wires.setdefault(ends, queue.Queue())

    def new_group(self, backend):
        assert backend == "gloo"
        self.barrier.wait()  # all processes have to call it
        self.here.groups = getattr(self.here, "groups", 0) + 1
        return self.here.groups

    def send(self, tensor, target, group):
        received = threading.Event()
        self.wire(self.here.rank, target, group).put((tensor.clone(), received))
        assert received.wait(20)
        self.sent.append(tensor.nbytes)

    def recv(self, tensor, source, group):
        found, received = self.wire(source, self.here.rank, group).get(timeout=20)
        tensor.copy_(found)
        received.set()

    def all_gather_object(self, into, own):
        self.gathered[self.here.rank] = own
        self.barrier.wait()
        into[:] = self.gathered
        self.barrier.wait()


def together(monkeypatch, world, work):
    """What a function of the rank gives in each of some threads that stand for processes."""
    wires = Wires(world)
    monkeypatch.setattr(rows, "distributed", wires)

    def process(rank):
        wires.here.rank = rank
        return work(rank)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(process, range(world))), wires


def store(kind, folder, rank):
    return ClientStore() if kind == "memory" else DiskClientStore(folder / f"rank{rank}")


def processes(world, rank, kept):
    return ClientRows(kept, N, SimpleNamespace(global_rank=rank, world_size=world))


@pytest.mark.parametrize("kind", ["memory", "disk"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_rows_are_where_clients_train_once_and_the_newest(monkeypatch, tmp_path, world, kind):
    """Twelve rounds with random clients in random processes; some messages are not used. Then other processes go on."""
    draw = random.Random(world)
    rounds, newest = [], {}
    for time in range(12):
        clients = draw.sample(range(N), 7)
        shares = [[] for _ in range(world)]
        for client in sorted(clients):
            shares[draw.randrange(world)].append(client)
        used = {client for client in clients if draw.random() < 0.8}
        rounds.append((shares, used, dict(newest)))
        newest |= {client: row(client, time) for client in used}

    def work(rank):
        own = processes(world, rank, store(kind, tmp_path, rank))
        for time, (shares, used, before) in enumerate(rounds):
            assert own.bring(shares) == shares[rank]
            for client in shares[rank]:
                found = own.store.take(client)  # as it was when its message was last used
                assert same(found, before.get(client, {}))
                own.store.put_row(client, row(client, time) if client in used else found)
        saved, clients = own.state_dict(), own.store.clients()
        assert saved["alone"] == (world > 1)
        path = tmp_path / "a.ckpt"
        whole = own.gathered(saved)
        if rank == 0:
            save_checkpoint(path, {"fedlight": {"format": 2, "clients": whole}})
        else:
            own.hand_over(saved)
        return clients

    kept, _ = together(monkeypatch, world, work)
    assert sorted(client for clients in kept for client in clients) == sorted(newest)

    def go_on(rank):
        own = processes(others, rank, store(kind, tmp_path, rank))
        own.load(load_checkpoint(tmp_path / "a.ckpt")["fedlight"]["clients"])
        shares = [list(range(rank, N, others)) for rank in range(others)]
        clients = own.store.clients()
        for client in own.bring(shares):
            assert same(own.store.take(client), newest.get(client, {}))
        return clients

    for others in (1, 2, 3):
        kept, _ = together(monkeypatch, others, go_on)
        assert sorted(client for clients in kept for client in clients) == sorted(newest)


def test_a_row_that_is_where_it_is_needed_is_not_sent(monkeypatch):
    def work(rank):
        own = processes(2, rank, ClientStore())
        for client in range(rank, N, 2):
            own.store.put_row(client, row(client))
        own.bring([[0, 2], [1]])
        return own.bring([[0, 2, 4], [3]])

    shares, wires = together(monkeypatch, 2, work)
    assert shares == [[0, 2, 4], [3]]
    assert wires.sent == []


def test_rows_of_one_of_several_processes_are_no_checkpoint(monkeypatch):
    """As when another one fails before the best round is written."""
    saved, _ = together(monkeypatch, 2, lambda rank: processes(2, rank, ClientStore()).state_dict())
    with pytest.raises(ValueError, match="written when one of several processes had failed.* continue from `last`"):
        processes(1, 0, ClientStore()).load(saved[0])


def test_where_nothing_can_be_written_the_others_are_rid_of_their_rows_all_the_same(monkeypatch, tmp_path):
    """They would wait for ever otherwise, and the first process could not stop them."""

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fedlight.run.checkpoint.atomic_file", full)

    def work(rank):
        own = processes(3, rank, ClientStore())
        own.store.put_row(rank, row(rank))
        saved = own.state_dict()
        if rank:
            own.gathered(saved)
            return own.hand_over(saved)
        content = {"fedlight": {"clients": own.gathered(saved)}}
        with pytest.raises(OSError, match="No space left"):
            snapshot._write(SimpleNamespace(metrics_csv=None), tmp_path / "a.ckpt", content)
        return "said"

    assert together(monkeypatch, 3, work)[0] == ["said", None, None]


def test_a_torn_file_of_rows_is_no_checkpoint(tmp_path):
    file = io.BytesIO()
    torch.save(content([]), file)
    rows.append_rows(file, [(i, row(i)) for i in range(4)])
    (tmp_path / "a.ckpt").write_bytes(file.getvalue()[:-40])
    with pytest.raises(MisconfigurationException, match="torn, damaged or no checkpoint"):
        load_checkpoint(tmp_path / "a.ckpt")

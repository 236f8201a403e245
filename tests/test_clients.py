"""Client stores: memory and disk agree, and disk survives being killed at any time."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.algorithms.scaffold import SCAFFOLD
from fedlight.server.clients import ClientStore, DiskClientStore, client_store
from tests.helpers.tiny import Clients, Regression, quiet_trainer, seeded, weights


def state(client, time, dtype=torch.float32):
    return {
        "h": seeded(2, 3, seed=100 * client + time, dtype=dtype),
        "count": torch.tensor(time),
        "flag": torch.tensor([time % 2 == 0]),
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_disk_gives_what_memory_gives(tmp_path, dtype):
    memory, disk = ClientStore(), DiskClientStore(tmp_path / "clients")
    for time in range(4):
        for client in range(time, 7, 2):
            for store in (memory, disk):
                store.put(client, "algorithm", state(client, time, dtype))
                store.put(client, "latest", {"params": seeded(5, seed=client * time, dtype=dtype)})
                store.put(client, "transforms", {"params/0/error": seeded(5, seed=client + time, dtype=dtype)})
        if time % 2:
            for store in (memory, disk):
                store.state_dict()
                store.committed()
    assert memory.clients() == disk.clients() == list(range(7))
    for client in range(7):
        for part in ("algorithm", "latest", "transforms"):
            assert same(memory.get(client, part), disk.get(client, part))
    assert memory.get(7, "latest") is None
    assert disk.get(7, "latest") is None
    assert memory.get(0, "other") is None
    assert disk.get(0, "other") is None


@pytest.mark.parametrize("make", [lambda path: ClientStore(), DiskClientStore])
def test_an_empty_state_takes_no_room(tmp_path, make):
    store = make(tmp_path / "clients")
    store.put(3, "algorithm", {})
    assert store.clients() == []
    assert not (tmp_path / "clients").exists()


@pytest.mark.parametrize("commit_each", [True, False])
def test_rows_of_the_last_checkpoint_are_never_overwritten(tmp_path, commit_each):
    """Killed after any put, a run finds the rows of its last checkpoint, and goes on as if it had not been killed."""
    store = DiskClientStore(tmp_path / "clients")
    for time in range(3):
        for client in range(4):
            store.put(client, "algorithm", state(client, time))
        if commit_each or time == 2:
            checkpoint = store.state_dict()
            store.committed()
    for time in (3, 4, 5):  # what a killed run did after its last checkpoint
        for client in (0, 2, 5):
            store.put(client, "algorithm", state(client, time))
            resumed = DiskClientStore(tmp_path / "clients")
            resumed.load_state_dict(checkpoint)
            assert resumed.clients() == [0, 1, 2, 3]
            assert all(same(resumed.get(i, "algorithm"), state(i, 2)) for i in range(4))
    for client in (0, 2, 5):
        resumed.put(client, "algorithm", state(client, 9))
    assert all(same(resumed.get(i, "algorithm"), state(i, 9)) for i in (0, 2, 5))
    assert all(same(resumed.get(i, "algorithm"), state(i, 2)) for i in (1, 3))


def test_slots_are_used_again_so_that_files_do_not_grow(tmp_path):
    store = DiskClientStore(tmp_path)
    for time in range(20):
        for client in range(3):
            store.put(client, "latest", {"params": seeded(100, seed=time)})
        store.state_dict()
        store.committed()
    assert (tmp_path / "latest.params.bin").stat().st_size == 6 * 400  # three rows, and three of the checkpoint before


def test_an_older_checkpoint_whose_rows_are_gone_is_refused(tmp_path):
    store = DiskClientStore(tmp_path)
    checkpoints = []
    for time in range(3):
        for client in range(2):
            store.put(client, "latest", {"params": seeded(4, seed=10 * time + client)})
        checkpoints.append(store.state_dict())
        store.committed()
    with pytest.raises(ValueError, match="clients \\[0, 1\\] on disk is not what .* Continue from `last`"):
        DiskClientStore(tmp_path).load_state_dict(checkpoints[0])
    DiskClientStore(tmp_path).load_state_dict(checkpoints[2])
    (tmp_path / "latest.params.bin").unlink()
    with pytest.raises(MisconfigurationException, match="latest.params.bin is gone"):
        DiskClientStore(tmp_path).load_state_dict(checkpoints[2])


def test_a_flipped_bit_of_a_row_is_found(tmp_path):
    store = DiskClientStore(tmp_path)
    for client in range(3):
        store.put(client, "latest", state(client, 1))
    checkpoint, file = store.state_dict(), tmp_path / "latest.h.bin"
    whole = file.read_bytes()
    for at in range(24, 48, 5):  # the row of client 1: six float32
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="the state of clients \\[1\\] on disk is not what this checkpoint"):
            DiskClientStore(tmp_path).load_state_dict(checkpoint)
    file.write_bytes(whole[:-1])
    with pytest.raises(MisconfigurationException, match="latest.h.bin has lost its end"):
        DiskClientStore(tmp_path).load_state_dict(checkpoint)


def test_a_state_of_zero_elements(tmp_path):
    store = DiskClientStore(tmp_path / "clients")
    for value in (torch.zeros(0), torch.zeros(0, 3, dtype=torch.int64)):
        store.put(2, "algorithm", {"local": value, "none": value})
        assert same(store.get(2, "algorithm"), {"local": value, "none": value})
        resumed = DiskClientStore(tmp_path / "clients")
        resumed.load_state_dict(store.state_dict())
        assert same(resumed.get(2, "algorithm"), {"local": value, "none": value})
        store = DiskClientStore(tmp_path / "others")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE])
def test_a_disk_that_fills_while_a_row_is_written(tmp_path, monkeypatch, number):
    store = DiskClientStore(tmp_path)
    store.put(0, "latest", state(0, 0))
    before, real = store.state_dict(), Path.open

    def full(path, mode="r", *args, **kwargs):
        if "+" in mode:
            raise OSError(number, os.strerror(number))
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    said = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "quota", errno.EMFILE: "too many files are open"}[number]
    with pytest.raises(MisconfigurationException, match=f"cannot write to {tmp_path}: .*{said}"):
        store.put(1, "latest", state(1, 0))
    DiskClientStore(tmp_path).load_state_dict(before)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_device_without_room_is_an_error_and_no_signal(tmp_path):
    store = DiskClientStore(tmp_path)
    for name in ("h", "count", "flag"):
        (tmp_path / f"latest.{name}.bin").symlink_to("/dev/full")
    with pytest.raises(MisconfigurationException, match="the disk is full"):
        store.put(0, "latest", state(0, 0))


def test_a_folder_that_is_deleted_is_not_begun_anew(tmp_path):
    """A new file would be zeros where the rows of the other clients were."""
    store = DiskClientStore(tmp_path / "clients")
    for client in range(3):
        store.put(client, "latest", state(client, 0))
    shutil.rmtree(tmp_path / "clients")
    for use in (lambda: store.get(1, "latest"), lambda: store.put(2, "latest", state(2, 1)), store.state_dict):
        with pytest.raises(MisconfigurationException, match="latest.* is gone"):
            use()


def test_rows_with_other_tensors_than_before_and_a_resume(tmp_path):
    """Client 0 has a tensor more from its second round on, client 1 has not; slots of both kinds are used again."""
    store = DiskClientStore(tmp_path / "rank0")
    for i in range(2):
        store.put(i, "buffers", {"a": torch.full((3,), float(i))})
    more = {"a": torch.full((3,), 5.0), "b": torch.tensor([7.0])}
    store.put(0, "buffers", more)
    store.put(2, "buffers", more)
    saved = store.state_dict()
    loaded = DiskClientStore(tmp_path / "rank0")
    loaded.load_state_dict(saved)
    for found in (store, loaded):
        assert found.clients() == [0, 1, 2]
        assert found.get(0, "buffers").keys() == found.get(2, "buffers").keys() == {"a", "b"}
        assert found.get(0, "buffers")["b"].tolist() == [7.0]
        assert found.get(1, "buffers").keys() == {"a"}
        assert found.get(1, "buffers")["a"].tolist() == [1.0] * 3
    loaded.committed()
    loaded.put(0, "buffers", {"a": torch.full((3,), 9.0)})  # and back, into the slot that it left
    assert loaded.get(0, "buffers")["a"].tolist() == [9.0] * 3
    assert (tmp_path / "rank0" / "buffers.a.bin").stat().st_size == 2 * 3 * 4


def test_rows_in_a_checkpoint_go_to_disk_but_not_the_other_way(tmp_path):
    memory = ClientStore()
    memory.put(4, "algorithm", state(4, 1))
    disk = DiskClientStore(tmp_path)
    disk.load_state_dict(memory.state_dict())
    assert same(disk.get(4, "algorithm"), state(4, 1))
    with pytest.raises(ValueError, match="trainer.client_state=disk"):
        memory.load_state_dict(disk.state_dict())


def test_the_rows_of_a_process_that_is_no_more_are_copied(tmp_path):
    first, second = DiskClientStore(tmp_path / "rank0"), DiskClientStore(tmp_path / "rank1")
    first.put(0, "algorithm", state(0, 0))
    second.put(1, "algorithm", state(1, 0))
    saved = [first.state_dict(), second.state_dict()]
    alone = DiskClientStore(tmp_path / "rank0")
    for rank, own in enumerate(saved):
        alone.load_state_dict(own, rank)
    assert all(same(alone.get(i, "algorithm"), state(i, 0)) for i in (0, 1))
    for rank, own in enumerate(saved):  # the checkpoint is still true
        again = DiskClientStore(tmp_path / f"rank{rank}")
        again.load_state_dict(own)
        assert again.clients() == [rank]


@pytest.mark.parametrize("make", [lambda path: ClientStore(), DiskClientStore])
def test_a_row_that_is_taken_is_not_kept_any_more(tmp_path, make):
    store = make(tmp_path / "rank0")
    for client in range(3):
        store.put(client, "algorithm", state(client, 0))
        store.put(client, "latest", {"params": seeded(4, seed=client)})
    saved = store.state_dict()
    row = store.take(1)
    assert row.keys() == {"algorithm", "latest"}
    assert same(row["algorithm"], state(1, 0))
    assert same(row["latest"], {"params": seeded(4, seed=1)})
    assert store.clients() == [0, 2]
    assert store.take(1) == store.take(7) == {}
    store.put(3, "latest", {"params": seeded(4, seed=9)})  # into no slot that the checkpoint refers to
    before = make(tmp_path / "rank0")
    before.load_state_dict(saved)
    assert before.clients() == [0, 1, 2]
    assert same(before.get(1, "algorithm"), state(1, 0))
    store.put_row(1, row)
    assert same(store.get(1, "algorithm"), state(1, 0))


def test_a_row_is_not_kept_alive_by_the_vector_that_it_is_a_part_of():
    stream = torch.zeros(1000)
    store = ClientStore()
    store.put(0, "latest", {"params": stream[10:20]})
    assert store.get(0, "latest")["params"].untyped_storage().nbytes() == 40


def test_a_snapshot_keeps_its_rows_while_the_store_goes_on():
    store = ClientStore()
    store.put(0, "latest", {"params": torch.ones(2)})
    snapshot = store.state_dict()
    store.put(0, "latest", {"params": torch.zeros(2)})
    store.put(1, "latest", {"params": torch.zeros(2)})
    ((client, row),) = snapshot["rows"]
    assert client == 0
    assert torch.equal(row["latest"]["params"], torch.ones(2))


def test_auto_leaves_the_device_when_its_share_is_full():
    store = ClientStore("meta", "auto", limit_bytes=100)  # the meta device stands for a GPU
    for client in range(3):
        store.put(client, "latest", {"params": torch.zeros(10)})
    kept = [row["latest"]["params"].device.type for row in store._rows.values()]
    assert kept == ["meta", "meta", "cpu"]
    store.put(1, "latest", {"params": torch.zeros(5)})  # replaced, so that there are 40 bytes left
    store.put(2, "latest", {"params": torch.zeros(10)})
    store.put(3, "latest", {"params": torch.zeros(1)})
    assert [row["latest"]["params"].device.type for row in store._rows.values()] == ["meta", "meta", "meta", "cpu"]
    always = ClientStore("meta", "device", limit_bytes=1)
    always.put(0, "latest", {"params": torch.zeros(10)})
    assert always._rows[0]["latest"]["params"].device.type == "meta"
    never = ClientStore("meta", "cpu")
    never.put(0, "latest", {"params": torch.zeros(10)})
    assert never._rows[0]["latest"]["params"].device.type == "cpu"
    assert never.get(0, "latest")["params"].device.type == "meta"


def test_the_setting_chooses_the_store(tmp_path):
    assert isinstance(client_store("disk", tmp_path, torch.device("cpu")), DiskClientStore)
    for where in ("auto", "device", "cpu"):
        assert type(client_store(where, tmp_path, torch.device("cpu"))) is ClientStore


@pytest.mark.parametrize("where", ["device", "cpu", "disk"])
def test_training_is_the_same_wherever_state_is_kept(tmp_path, where):
    models = {}
    for kept in ("auto", where):
        models[kept] = Regression()
        quiet_trainer(tmp_path, algorithm=SCAFFOLD(), client_state=kept).fit(models[kept], Clients())
    assert torch.equal(weights(models["auto"]), weights(models[where]))


def test_only_sampled_clients_have_state(tmp_path):
    trainer = quiet_trainer(tmp_path, algorithm=SCAFFOLD(), client_state="disk", clients_per_round=1, max_rounds=2)
    trainer.fit(Regression(), Clients(sizes=(4,) * 1000))
    store = trainer._session.federation.store
    assert 1 <= len(store.clients()) <= 2
    folder = trainer.run_dir / "clients" / "rank0"
    parameters = 4
    assert (folder / "latest.params.bin").stat().st_size <= 2 * parameters * 4


def test_a_run_with_state_on_disk_resumes_to_the_same_bits(tmp_path):
    settings = {"algorithm": SCAFFOLD(), "client_state": "disk", "max_rounds": 5}
    whole = Regression()
    quiet_trainer(tmp_path / "whole", **settings).fit(whole, Clients())
    first = quiet_trainer(tmp_path / "parts", **{**settings, "max_rounds": 2})
    first.fit(Regression(), Clients())
    resumed = Regression()
    quiet_trainer(tmp_path / "parts", **settings).fit(resumed, Clients(), ckpt_path="last")
    assert torch.equal(weights(whole), weights(resumed))

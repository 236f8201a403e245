"""A federation of processes on this machine: it runs an app to its end, and leaves nothing running."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.flower.local import LocalFederation, Program, local_federation

flower = pytest.mark.skipif(find_spec("flwr") is None, reason='needs pip install "fedlight[flower]"')
CLIENT = """
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    kept = Path(context.node_config["state"]) / "count"
    kept.parent.mkdir(parents=True, exist_ok=True)
    count = int(kept.read_text()) + 1 if kept.exists() else 1
    kept.write_text(str(count))
    told = {"ids": str(context.node_config["partition-ids"]), "count": count, "allow": context.node_config["allow"]}
    return Message(content=RecordDict({"told": ConfigRecord(told)}), reply_to=message)
"""
SERVER = """
import time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    for round in range(context.run_config["rounds"]):
        while len(nodes := list(grid.get_node_ids())) < 2:
            time.sleep(0.1)
        messages = [
            Message(content=RecordDict({"none": ConfigRecord()}), message_type="train", dst_node_id=node)
            for node in nodes
        ]
        told = [reply.content["told"] for reply in grid.send_and_receive(messages, timeout=100)]
        for text in sorted(f"{record['ids']}: {record['count']}, {record['allow']}" for record in told):
            print(f"round {round}, clients {text}", flush=True)
    if context.run_config["fail"]:
        raise ValueError("asked to fail")
"""
PROJECT = """
[project]
name = "counting"
version = "1.0.0"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.42"]

[tool.flwr.app]
publisher = "local"
fab-format-version = 1
flwr-version-target = "1.42.0"

[tool.flwr.app.components]
serverapp = "counting.server_app:app"
clientapp = "counting.client_app:app"

[tool.flwr.app.config]
rounds = 1
fail = false
"""


@pytest.fixture
def app(tmp_path):
    """An app that has nothing of fedlight: sites count the messages that they have seen."""
    (tmp_path / "counting").mkdir()
    files = {"client_app.py": CLIENT, "server_app.py": SERVER, "__init__.py": ""}
    for name, text in files.items():
        (tmp_path / "counting" / name).write_text(text)
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "LICENSE").write_text("")
    return tmp_path


def alive(program):
    try:
        os.killpg(program.pid, 0)
    except ProcessLookupError:
        return False
    states = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
    return any(state[0] != "Z" for state in states if int(state[2]) == program.pid)


def ended(pid):
    """Whether a process is gone, or waits for its parent to look."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.slow
@flower
def test_an_app_runs_and_all_processes_end(app):
    said = []
    with local_federation(app, nodes=2, clients=5, allow="a b") as federation:
        assert federation.run("rounds=2", said.append)
        assert not federation.run("fail=true", said.append)
        home, programs = federation.home, list(federation.programs)
        federation.nodes[1].kill()
        assert federation.nodes[1].wait() == -signal.SIGKILL
        federation.start_node(1).wait_for("SuperNode ID")
    told = [line for line in said if line.startswith("round")]
    assert told == [
        f"round {round}, clients {ids}: {count}, a b"
        for round, count in ((0, 1), (1, 2), (0, 3))
        for ids in ("0 2 4", "1 3")
    ]
    assert any("asked to fail" in line for line in said)
    assert len({program.pid for program in programs}) == 6
    assert not [program.log for program in federation.programs if alive(program)]
    assert not home.exists()
    assert (app / ".flwr" / "logs" / "node1.log").is_file()


@pytest.mark.slow
@flower
def test_a_node_without_a_known_key_is_refused(app):
    said = []
    with local_federation(app, nodes=2, secure=True) as federation:
        strangers = [
            federation.start("keyless", *stranger(federation)),
            federation.start("unknown", *stranger(federation), "--auth-supernode-private-key", new_key(app)),
            federation.start("plain", *stranger(federation, "--insecure")),
        ]
        assert federation.run("rounds=1", said.append)
        assert not [s.log.name for s in strangers if "SuperNode ID" in s.log.read_text()]
    assert [line for line in said if line.startswith("round")] == [
        "round 0, clients 0: 1, ", "round 0, clients 1: 1, ",
    ]  # fmt: skip


def stranger(federation: LocalFederation, *trust: str):
    with socket.create_server(("127.0.0.1", 0)) as free:
        where = ["--superlink", federation.address, "--port", str(free.getsockname()[1])]
    return "flower-supernode", *where, *(trust or federation.trust), "--node-config", 'partition-ids="9" state="none"'


def new_key(folder):
    key = folder / "stranger.key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", key], check=True)
    return str(key)


NET = """
import torch
from lightning.pytorch import LightningModule

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""


@pytest.mark.slow
@flower
def test_a_module_of_ones_own_is_deployed_and_a_signal_ends_everything(tmp_path, monkeypatch):
    """The command as people type it, in processes of its own."""
    monkeypatch.chdir(tmp_path)
    Path("own_net.py").write_text(NET)
    data = ["--data=ImageData", "--data.source=digits", "--data.num_clients=3"]
    trainer = ["--trainer.max_rounds=1", "--trainer.accelerator=cpu", "--trainer.client_val_every_n_rounds=0"]
    command = [sys.executable, "-m", "fedlight", "deploy", "flower", "-o", "app", "--local", "2"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([*command, "--model=own_net.Net", *data, *trainer], check=False, **options)
    assert done.returncode == 0, done.stdout
    assert "have 3 clients" in done.stdout
    assert "The run is finished" in done.stdout
    assert Path("app/own_net.py").is_file()
    run = Path("runs/default/version_0")
    assert (run / "summary.json").is_file()
    assert (run / "checkpoints" / "last.ckpt").is_file()
    Path("own_net.py").unlink()  # the app has it
    again = subprocess.Popen(command, **options)
    assert next(line for line in again.stdout if "have 3 clients" in line)
    again.send_signal(signal.SIGTERM)
    said, _ = again.communicate(timeout=60)
    assert again.returncode == 128 + signal.SIGTERM, said
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in commands if str(tmp_path).encode() in command]


def test_a_program_ends_with_all_that_it_has_started(tmp_path):
    code = "import subprocess, sys; subprocess.Popen(['sleep', '60']); print('up', flush=True); sys.stdin.read()"
    code += "; import time; time.sleep(60)"
    program = Program([sys.executable, "-S", "-c", code], tmp_path / "a.log", dict(os.environ))
    program.wait_for("up")
    assert alive(program)
    program.kill()
    program.wait()
    until = time.monotonic() + 5
    while alive(program) and time.monotonic() < until:
        time.sleep(0.01)
    assert not alive(program)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_programs_end_where_their_parent_is_killed(tmp_path):
    code = (
        "import os, pathlib, sys, time; from fedlight.flower.local import LocalFederation;"
        " f = LocalFederation(pathlib.Path(sys.argv[1]), ['0'], '', False, pathlib.Path(sys.argv[1]));"
        " p = f.start('sleeper', 'sh', '-c', 'echo up; exec sleep 60'); p.wait_for('up');"
        " print(p.pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    until = time.monotonic() + 10
    while not ended(pid) and time.monotonic() < until:
        time.sleep(0.01)
    assert ended(pid)


def test_what_does_not_come_up_is_an_error_with_the_end_of_its_log(tmp_path):
    (tmp_path / "one.log").write_text("up in an earlier life\n")
    program = Program(["sh", "-c", "echo address in use; exit 3"], tmp_path / "one.log", dict(os.environ))
    with pytest.raises(ConnectionError, match=r"one ended with 3. The end of .*one.log:\naddress in use"):
        program.wait_for("up")
    program = Program(["sleep", "60"], tmp_path / "two.log", dict(os.environ))
    with pytest.raises(ConnectionError, match=r"two is not up after 0.1 s"):
        program.wait_for("up", 0.1)
    program.kill()
    program.wait()


def test_every_node_needs_a_client(tmp_path):
    with (
        pytest.raises(MisconfigurationException, match="3 nodes for 2 clients"),
        local_federation(tmp_path, nodes=3, clients=2),
    ):
        pass

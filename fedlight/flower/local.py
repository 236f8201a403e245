"""A federation of processes on this machine: one SuperLink, and SuperNodes that share the clients."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.studies.command import handling

HOST = "127.0.0.1"
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1"}


class Program(subprocess.Popen[bytes]):
    """A program that writes a log, in a session of its own: signals go to all that it has started."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("ab") as out:
            self._begin = out.tell()
            super().__init__(command, env=environment, start_new_session=True, stdout=out, stderr=subprocess.STDOUT)

    def send_signal(self, number: int) -> None:
        """Send a signal to the session; ``kill`` and ``terminate`` do so, too."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def lines(self) -> Iterator[str]:
        """The lines that it has written and writes, until it ends."""
        with self.log.open(errors="replace") as log:
            log.seek(self._begin)
            running = True
            while running:
                running = self.poll() is None
                yield from (line.rstrip("\n") for line in iter(log.readline, ""))
                time.sleep(0.1)
                yield ""

    def wait_for(self, ready: str, seconds: float = 180) -> None:
        """Wait for words in its log, or raise ConnectionError with the end of that."""
        until, end = time.monotonic() + seconds, ""
        for line in self.lines():
            end = f"{end}\n{line}"[-2000:] if line else end
            if ready in line:
                return
            if time.monotonic() > until:
                break
        what = f"is not up after {seconds:g} s" if self.poll() is None else f"ended with {self.returncode}"
        raise ConnectionError(f"{self.log.stem} {what}. The end of {self.log}:{end}")


class LocalFederation:
    """What :func:`local_federation` has started.

    Attributes:
        address: the SuperLink's.
        nodes: the SuperNodes; ``nodes[1].kill()`` and ``start_node(1)`` are what befalls sites.
    """

    def __init__(self, app: Path, ids: Sequence[str], allow: str, secure: bool, home: Path) -> None:
        self.app, self.ids, self.allow, self.home = app, ids, allow, home
        self.folder = app.absolute() / ".flwr"  # which Flower leaves out of apps
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
        threads = str(max(1, (os.cpu_count() or 1) // len(ids)))
        chosen = {"OMP_NUM_THREADS": threads, "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}
        self.environment = {**chosen, **os.environ, **_QUIET, "PATH": path, "FLWR_HOME": str(home)}
        self.programs: list[Program] = []
        self.nodes: dict[int, Program] = {}
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(len(ids) + 1)]
            port, *self.ports = [str(each.getsockname()[1]) for each in sockets]
        self.address, self.trust, trust = f"{HOST}:{port}", ["--insecure"], "insecure = true"
        self.superlink = ["flower-superlink", "--host", HOST, "--port", port, "--isolation", "process"]
        if secure:
            key, certificate = str(home / "server.key"), str(home / "server.crt")
            make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 7 -subj /CN=localhost"
            self.call(*make.split(), "-addext", f"subjectAltName=IP:{HOST}", "-keyout", key, "-out", certificate)
            self.superlink += ["--ssl-ca-certfile", certificate, "--ssl-certfile", certificate, "--ssl-keyfile", key]
            self.trust, trust = ["--root-certificates", certificate], f'root-certificates = "{certificate}"'
        self.superlink += ["--enable-supernode-auth" if secure else "--insecure"]
        (home / "config.toml").write_text(f'[superlink.local]\naddress = "{self.address}"\n{trust}\n')

    def start(self, name: str, *command: str, **environment: str) -> Program:
        """Start a program that writes ``logs/<name>.log``."""
        log, setpriv = self.folder / "logs" / f"{name}.log", shutil.which("setpriv")
        guard = [setpriv, "--pdeathsig", "TERM"] if setpriv else []  # Linux: even where this process is killed
        self.programs.append(Program([*guard, *command], log, self.environment | environment))
        return self.programs[-1]

    def start_node(self, node: int) -> Program:
        """Start a SuperNode, also for a second time: what its clients keep is where it was.

        On Linux it ends with the thread that has started it.
        """
        config = {"partition-ids": self.ids[node], "state": f"{self.folder}/state/node{node}", "allow": self.allow}
        words = " ".join(f'{key}="{value}"' for key, value in config.items())
        command = ["--superlink", self.address, "--port", self.ports[node], "--node-config", words, *self.trust]
        if "--insecure" not in self.trust:
            if not (key := self.home / f"node{node}.key").exists():
                self.call("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(key))
                self.call("flwr", "supernode", "register", f"{key}.pub", "local")
            command += ["--auth-supernode-private-key", str(key)]
        home = str(self.home / f"node{node}")  # it unpacks apps there
        self.nodes[node] = self.start(f"node{node}", "flower-supernode", *command, FLWR_HOME=home)
        return self.nodes[node]

    def call(self, *command: str) -> str:
        """Run a command to its end, and return what it printed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConnectionError(f"`{' '.join(command)}` ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def run(self, config: str = "", said: Callable[[str], Any] = print) -> bool:
        """Run the app, and return whether it came to its end; ``said`` is called with each line of the run's log.

        ``config`` is what changes of the run configuration, as ``rounds=3 resume="last"``.
        """
        begun = self.call("flwr", "run", str(self.app), "local", *(["-c", config] if config else []))
        [run] = re.findall(r"started run (\d+)", begun)
        for line in filter(None, self.start("run", "flwr", "log", run, "local").lines()):
            said(line)
        [listed] = json.loads(self.call("flwr", "list", "local", "--run-id", run, "--format", "json"))["runs"]
        return bool(listed["status"] == "finished:completed")

    def end(self) -> None:
        """End everything; what is left after some seconds is killed."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for program in self.programs:
                program.send_signal(number)
            for program in self.programs:
                with suppress(subprocess.TimeoutExpired):
                    program.wait(timeout=3)


@contextmanager
def local_federation(
    app: str | Path, nodes: int = 3, clients: int | None = None, allow: str = "", secure: bool = False
) -> Iterator[LocalFederation]:
    """A SuperLink and SuperNodes on free ports of 127.0.0.1, which end with the block.

    Args:
        app: the folder of a Flower app; logs and what clients keep go to ``.flwr/`` in it.
        nodes: number of SuperNodes.
        clients: number of clients, of which node k has those with i % nodes = k; by default one for each node.
        allow: what travelling configurations may name besides fedlight's own classes.
        secure: TLS, and only nodes with a registered key; ``openssl`` and ``ssh-keygen`` make certificate and keys.

    Raises:
        MisconfigurationException: with fewer clients than nodes.
        ConnectionError: where something does not come up, with the end of its log.
    """
    if (clients := nodes if clients is None else clients) < nodes:
        raise MisconfigurationException(f"{nodes} nodes for {clients} clients: every node needs a client of its own.")
    ids = [" ".join(map(str, range(node, clients, nodes))) for node in range(nodes)]
    with TemporaryDirectory(prefix="fedlight-flower-") as home:
        federation = LocalFederation(Path(app), ids, allow, secure, Path(home))
        try:
            federation.start("superlink", *federation.superlink).wait_for("Uvicorn running")
            starts_servers = ["flower-superexec", *federation.trust, "--runtime-api-address", federation.address]
            federation.start("server", *starts_servers)
            for program in [federation.start_node(node) for node in range(nodes)]:
                program.wait_for("SuperNode ID")
            yield federation
        finally:
            federation.end()


def run_local(app: Path, nodes: int, clients: int, allow: str) -> int:
    """Run an app on this machine; the exit code is 1 where it does not come to its end, 143 for SIGTERM."""
    stopped = handling(lambda number, frame: sys.exit(128 + number), signal.SIGTERM)
    with stopped, local_federation(app, nodes, clients, allow) as federation:
        print(f"{nodes} SuperNodes at {federation.address} have {clients} clients.", flush=True)
        finished = federation.run(said=partial(print, flush=True))
    print(f"The run {'is finished' if finished else 'has failed'}; logs are in {federation.folder / 'logs'}")
    return 0 if finished else 1

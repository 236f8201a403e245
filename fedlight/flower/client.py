"""What a site does with a message: it trains, or evaluates, and answers. Its process may be a new one each time."""

import platform
import re
import time
import traceback
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fedlight import __version__
from fedlight.analysis.measurement import Measurement, Survey
from fedlight.analysis.memory import free_memory, graph_bytes
from fedlight.callbacks._rounds import RoundCallback
from fedlight.data.datamodule import first_samples
from fedlight.flower.config import OwnData, build, check_allowed
from fedlight.flower.messages import Parcel, part
from fedlight.flower.spectrum import site_sums
from fedlight.local import ClientResult
from fedlight.penalties.numbers import follow
from fedlight.perturbations.base import State
from fedlight.run.attempt import evaluating, trial_step
from fedlight.run.context import RunContext
from fedlight.run.folder import atomic_file
from fedlight.run.preflight import check_data, check_methods
from fedlight.run.processes import use_threads
from fedlight.run.session import Session
from fedlight.run.views import evaluate_clients
from fedlight.server.client_side import ClientSide, Reply
from fedlight.server.clients import Row, tensor_bytes
from fedlight.server.state import ServerState, moved
from fedlight.trainer import FederatedTrainer

_FILE = re.compile(r"round_(\d+)\.pt")


class SiteState:
    """The rows of one client, a file for each round that it trained in.

    A reply may be lost, so that the server goes on without it; or the server may be started again from an earlier
    checkpoint. So nothing is overwritten: the server says with every message after which round the client's state is
    the one that counts, and which rounds it can no longer go back to. ``experiment`` is the run's id.
    """

    def __init__(self, folder: Path, experiment: str, client: int) -> None:
        if not re.fullmatch("[0-9a-f]{32}", experiment):
            raise ValueError(f"the id of a run must be 32 hexadecimal digits, and {experiment!r} is not")
        self._folder, self._client = folder / experiment / f"client_{client}", client

    def _file(self, round: int) -> Path:
        return self._folder / f"round_{round}.pt"

    def load(self, round: int) -> Row:
        """The rows after a round, or a FileNotFoundError; none before the first one, -1."""
        if round < 0:
            return {}
        if not self._file(round).exists():
            said = f"client {self._client}: its state after round {round + 1} is not in {self._folder}"
            raise FileNotFoundError(f"{said}. Start the node with the `state` folder that it had, or the run anew.")
        found: dict[str, Any] = torch.load(self._file(round), weights_only=True)
        return found

    def save(self, round: int, row: Row, keep: int) -> None:
        """Keep the rows after a round, and those from round ``keep`` on."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._file(round)) as file:
            torch.save({part: {k: v.cpu() for k, v in state.items()} for part, state in row.items() if state}, file)
        for path in self._folder.iterdir():
            if (match := _FILE.fullmatch(path.name)) and int(match[1]) < keep:
                path.unlink()


class _AtSite(ClientSide):
    received: State | None = None

    def broadcast(self, server: ServerState) -> State:
        """What the message brought."""
        return super().broadcast(server) if self.received is None else self.received


def clients_of(node: Mapping[str, Any]) -> list[int]:
    """The clients that live at a node, by its ``partition-ids`` or ``partition-id``; an error if there are none."""
    given = str(node.get("partition-ids", node.get("partition-id", ""))).replace(",", " ").split()
    if not given or not all(number.isdecimal() for number in given) or len({*given}) < len(given):
        found = f"partition-ids={' '.join(given)!r}"
        raise MisconfigurationException(f"node-config: {found} must be the clients that live here, as '0 3'.")
    return [int(number) for number in given]


def answer(job: Parcel, config: Path, node: Mapping[str, Any]) -> Parcel:
    """Do what a message asks for: the answer, of kind ``refused`` with the reason where there is none."""
    started = time.perf_counter()
    try:
        check_allowed(yaml.safe_load(config.read_text()), str(node.get("allow", "")))
        cli = build(config, FederatedTrainer, {**job.info.get("options", {}), **node}, site=True)
        trainer, data, mine = cli.trainer, cli.datamodule, clients_of(node)
        of_rounds = RoundCallback, Measurement, Survey  # and no round is complete here
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, of_rounds)]
        if node.get("source") or node.get("own-data"):
            if len(mine) > 1:
                raise MisconfigurationException("node-config: a site with its own data is one client (partition-id).")
            data = OwnData(data, mine[0], job.info["num_clients"] or mine[0] + 1)
        session = SiteSession(trainer, cli.model, data, "fit", None)
        session.node = node
        with session:
            found: Parcel = getattr(session, f"on_{job.kind}")(job, mine)
    except Exception as error:  # whatever it is, the server has to hear of it
        traceback.print_exc()
        return Parcel("refused", {"why": f"{type(error).__name__}: {error}"})
    found.info["seconds"] = time.perf_counter() - started
    return found


def facts(run: RunContext) -> dict[str, Any]:
    """What server and sites must have in common: versions, the order of parameters, and what nobody sends."""
    layout, module = run.layout, run.module
    sent = {name for name, own in layout.views(run.trainer.personal.entries).items() if not own.any()}
    buffers = dict(module.named_buffers())
    if run.federation.clients.sends_buffers:
        sent |= {name for name in buffers if not run.federation.clients.is_local(name)}
    held = {k: v for k, v in {**dict(module.named_parameters()), **buffers}.items() if k not in sent}
    checksums = {name: zlib.crc32(tensor_bytes(value).data) for name, value in sorted(held.items())}
    return {
        "fedlight": __version__,
        "torch": torch.__version__.partition("+")[0],
        "parameters": [[info.name, list(info.shape)] for info in layout.parameters],
        "initial values of what is not sent": checksums,
        "num_classes": getattr(module, "num_classes", None),
    }


def check_memory(run: RunContext, client: int) -> None:
    """Refuse a site whose memory cannot hold a training: start, gradient and result, and the graph of one batch."""
    precision, size = run.fabric.strategy.precision, min(2, run.datamodule.client_size(client))
    batch = run.evaluator.prepare(first_samples(run.datamodule, client, size))
    params, step = list(run.module.parameters()), 0
    with evaluating(run.module), suppress(Exception):  # two samples may be too few for it; check_data says what fails
        step = graph_bytes(lambda: trial_step(run.module, batch, precision.forward_context()), params)
    largest = min(run.datamodule.batch_size, max(run.federation.sizes.tolist()))
    needed = 3 * sum(p.nbytes for p in params if p.requires_grad) + step * largest // max(1, size)
    if (free := free_memory(run.fabric.device)) < needed:
        raise MisconfigurationException(
            f"this site has too little memory: {free / 1e6:.3g} MB of {run.fabric.device} are free, and training takes"
            f" {needed / 1e6:.3g} MB at least. Lower data.batch_size for all, or give the site more."
        )


class SiteSession(Session):
    """One message at a site."""

    clients_class = _AtSite
    node: Mapping[str, Any]

    def _open_folder(self) -> None:
        return None

    def on_query(self, job: Parcel, mine: list[int]) -> Parcel:
        """Who lives here, with how many samples, and what the server has to have in common with us."""
        if beyond := [client for client in mine if client >= self.federation.num_clients]:
            raise MisconfigurationException(
                f"node-config: there is no client {beyond[0]} among {self.federation.num_clients}, as `data` has them."
            )
        if not self.node.get("state"):
            raise MisconfigurationException("node-config: `state` must be the folder that keeps the clients' state.")
        check_methods(self)
        check_memory(self, mine[0])
        check_data(self)
        sizes = {client: self.datamodule.client_size(client) for client in mine}
        own = self.datamodule.client_val_dataset(mine[0]) is not None
        found = {"sizes": sizes, "num_clients": self.federation.num_clients, "facts": facts(self), "evaluates": own}
        return Parcel("query", {**found, "batch_size": self.datamodule.batch_size, "host": platform.node()})

    def _receive(self, job: Parcel, clients: list[int]) -> None:
        """Be where the server is, with the clients' own state."""
        info, side, device = job.info, self.federation.clients, self.fabric.device
        received, server, buffers = (moved(job.part(name), device) for name in ("received", "server", "buffers"))
        state, params = self.federation.state, server.get("params", received["params"])
        self.movers.join(sorted(buffers.keys() - state.buffers.keys()))
        self.federation.state = ServerState(
            round=info["round"],
            algorithm={"params": params},
            buffers={**state.buffers, **buffers},
            views={"server": server.get("model", params)},
            personal=state.personal,
            loss_scale=info["loss_scale"],
        )
        assert isinstance(side, _AtSite)
        side.received, side.mean_size = received, info["mean_size"]
        for group, lr in zip(self.schedule.optimizer.param_groups, info["lrs"] or (), strict=False):
            group["lr"] = lr
        follow(self.trainer.scheduled, info["round"], device)
        for client in clients:
            self.federation.store.put_row(client, self._kept(job, client).load(info["since"][str(client)]))
        self.federation.begin()

    def _kept(self, job: Parcel, client: int) -> SiteState:
        return SiteState(Path(str(self.node["state"])), job.info["experiment"], client)

    def _begin(self, job: Parcel) -> list[int]:
        use_threads(self, self._cleanup)
        self.start_training()
        self.hooks.once("on_train_start")
        clients: list[int] = job.info["clients"]
        self._receive(job, clients)
        return clients

    def on_train(self, job: Parcel, mine: list[int]) -> Parcel:
        """Train the clients that the message names, and keep their new state beside the old one."""
        clients, side = self._begin(job), self.federation.clients
        self.hooks("on_round_start")
        self.views.find_losses(clients)
        figures, tensors = dict[int, Any](), dict[str, Tensor]()

        def receive(result: ClientResult) -> None:
            reply = side.reply(result)
            figures[result.client] = _figures(result, reply)
            sent = side.sends_buffers
            buffers = {k: v for k, v in result.buffers.items() if sent and not side.is_local(k)}
            for name, values in (("message", reply.packed.tensors), ("beside", reply.beside), ("buffers", buffers)):
                tensors.update(part(f"{result.client}/{name}", values))
            before = {name: self.federation.store.get(result.client, name) for name in reply.rows}
            row = {name: state or before[name] or {} for name, state in reply.rows.items()}
            self._kept(job, result.client).save(job.info["round"], row, job.info["keep"][str(result.client)])

        for take, tasks in side.trainings(clients, self.schedule.lrs, receive):
            for result in self.engine.train(job.info["round"], tasks):
                take(result)
        return Parcel("train", {"clients": figures}, tensors)

    def on_evaluate(self, job: Parcel, mine: list[int]) -> Parcel:
        """Evaluate the model that the message brings, and the clients' own, on the clients' held-out data."""
        clients = self._begin(job)
        self.views.load("server")
        found = evaluate_clients(self, clients)
        sizes = {c: len(d) if (d := self.datamodule.client_val_dataset(c)) is not None else 0 for c in clients}  # type: ignore[arg-type]
        return Parcel("evaluate", {"clients": found, "sizes": sizes})

    def on_product(self, job: Parcel, mine: list[int]) -> Parcel:
        """Sums over the clients' samples of what a Hessian's products are made of."""
        self._begin(job)
        self.views.load("server")
        sums, weight, infinite = site_sums(self, job)
        info = {"clients": job.info["clients"], "weight": weight, "infinite": infinite, "host": platform.node()}
        return Parcel("product", info, part("sums", sums))


def _figures(result: ClientResult, reply: Reply) -> dict[str, Any]:
    return {
        "num_samples": result.num_samples,
        "num_steps": result.num_steps,
        "lr_sum": result.lr_sum,
        "steps_apart": reply.steps_apart,
        "lengths": reply.packed.lengths,
        "loss_scale": None if result.loss_scale is None else float(result.loss_scale),
        "metrics": {name: [float(v), float(w)] for name, (v, w) in result.metrics.items()},
        "reductions": result.reductions,
    }

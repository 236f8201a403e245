"""The server of a federation of sites: :class:`FederatedTrainer`, with sites in the place of local training."""

import json
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info

from fedlight.callbacks._rounds import RoundCallback
from fedlight.callbacks.checkpoint import Checkpoint
from fedlight.data.datamodule import FederatedDataModule
from fedlight.engines.base import Engine, LocalTraining
from fedlight.flower.client import facts
from fedlight.flower.config import RemoteData, build
from fedlight.flower.messages import Transport
from fedlight.flower.sites import RemoteClients, Sites
from fedlight.flower.spectrum import SiteHessian
from fedlight.local import ClientResult
from fedlight.module.hooks import overrides
from fedlight.module.parameters import ParameterLayout
from fedlight.personal.base import Personalization
from fedlight.run.evaluation import Stage
from fedlight.run.experiment import differences
from fedlight.run.folder import read_json
from fedlight.run.names import over_clients
from fedlight.run.preflight import check_methods
from fedlight.run.session import Session
from fedlight.run.views import Row, Views
from fedlight.trainer import FederatedTrainer
from fedlight.transforms.attack import attacks_by


class SiteEngine(Engine):
    """Lets the sites train."""

    reason = "local training happens at the sites"

    def __init__(self, session: "ServerSession") -> None:
        self._session = session

    def setup(self, training: LocalTraining) -> None:
        """Nothing is trained here."""

    def train(self, round: int, tasks: Iterable[Any]) -> Iterator[ClientResult]:
        """Ask the sites of these clients, and hand out what each of them sends."""
        session = self._session
        side, sites, clients = session.side, session.trainer.sites, [int(c) for c in tasks]
        sites.down_bytes = sites.up_bytes = 0
        for parcel in sites.ask("train", clients, session.figures(), side.tensors(), session.stamps):
            for client, figures in parcel.info["clients"].items():
                try:
                    result = side.result(int(client), figures, parcel, session.fabric.device)
                except (ValueError, KeyError, IndexError, TypeError, RuntimeError, AttributeError) as error:
                    sites.missing[int(client)] = f"its message is refused, as {error}"
                else:
                    yield result
        sites.name_missing(round + 1, len(clients), required=True)


class SiteViews(Views):
    """Evaluates the server's model here, if there are data for it, and at the sites."""

    _run: "ServerSession"

    def find_losses(self, clients: Sequence[int]) -> None:
        """The sites do."""

    def on_clients(self) -> dict[int, dict[str, float]]:
        """What validation logs at the sites, by client."""
        run, found = self._run, dict[int, dict[str, float]]()
        sites, side, clients = run.trainer.sites, run.side, range(run.federation.num_clients)
        side.begin(run.federation.state)
        tensors = side.model("server")
        if type(run.trainer.personal) is not Personalization:  # what clients make of it is of interest as well
            tensors |= side.tensors()
        self.sizes: dict[int, int] = {}
        for parcel in sites.ask("evaluate", clients, run.figures(), tensors, run.stamps):
            found |= {int(client): metrics for client, metrics in parcel.info["clients"].items()}
            self.sizes |= {int(client): size for client, size in parcel.info["sizes"].items()}
        sites.name_missing(run.trainer.current_round)
        return dict(sorted(found.items()))

    def _evaluate(self, stage: Stage) -> Row:
        if not isinstance(self._run.datamodule, RemoteData) or stage != "validation":
            return super()._evaluate(stage)
        self.clients, logged = self.on_clients(), dict[str, list[tuple[float, int]]]()
        for client, metrics in self.clients.items():
            for name, value in metrics.items():
                if not name.startswith(("personal_", "new_")):
                    logged.setdefault(name, []).append((value, self.sizes[client]))
        self.logged = list(logged)
        return {name: math.fsum(v * n for v, n in each) / sum(n for _, n in each) for name, each in logged.items()}

    def _evaluate_clients(self) -> Row:
        if isinstance(self._run.datamodule, RemoteData):  # they have been asked already
            return {**over_clients(self.clients)}
        return super()._evaluate_clients()


class _Crossed(RoundCallback):
    """Says what really crossed, and how many clients did not answer."""

    def on_round_trained(self, trainer: Any, pl_module: Any) -> None:
        self._missing = len(trainer.sites.missing)

    def on_round_metrics(self, trainer: Any, pl_module: Any) -> dict[str, float]:
        sites = trainer.sites
        crossed = {"sites/down_mb": sites.down_bytes / 1e6, "sites/up_mb": sites.up_bytes / 1e6}
        return {"sites/missing": float(self._missing), **crossed}


class ServerSession(Session):
    """A fit whose clients live at sites."""

    clients_class, views_class = RemoteClients, SiteViews
    trainer: "ServerTrainer"
    _durable: dict[int, int]
    _written: dict[int, int]

    @property
    def side(self) -> RemoteClients:
        """The clients, by what they send."""
        assert isinstance(self.federation.clients, RemoteClients)
        return self.federation.clients

    def check(self) -> None:
        """Refuse what would fail, and sites that are not like the server."""
        check_methods(self)
        mine, sites = json.loads(json.dumps(facts(self))), self.trainer.sites
        for client, found in sorted(sites.found.items()):
            n, here = found["sizes"][str(client)], int(self.federation.sizes[client])
            other = differences({**mine, "samples": here}, {**found["facts"], "samples": n})
            if other:
                text = "; ".join(f"{key}: {there} there, {own} here" for key, (own, there) in other.items())
                raise MisconfigurationException(f"client {client} on {found['host']} is not like the server: {text}")
        side, state = self.side, self.federation.state
        if state.buffers and not (side.sends_buffers and all(not side.is_local(name) for name in state.buffers)):
            rank_zero_info("sites: buffers stay there; the server's model, and val/*, have those of before training.")
        self._durable, self._written, self.id = {}, {}, uuid.uuid4().hex
        if self.folder is not None:
            path = self.folder.path / "sites.json"
            if path.exists():
                self.id = str(read_json(path).get("id", ""))
                if not self.id:
                    what = "is damaged. Its `id` names what sites keep of this run: repair it, or begin anew"
                    raise MisconfigurationException(f"{path} {what}, without `resume`.")
            hosts = {client: found["host"] for client, found in sorted(sites.found.items())}
            self.folder.write_json(path.name, {"id": self.id, "hosts": hosts})

    def make_engine(self) -> Engine:
        """The sites."""
        return SiteEngine(self)

    def figures(self) -> dict[str, Any]:
        """What every site is told of the round."""
        state = self.federation.state
        return {
            "experiment": self.id,
            "round": state.round,
            "lrs": self.schedule.lrs,
            "loss_scale": state.loss_scale,
            "mean_size": self.side.mean_size,
        }

    def stamps(self, clients: list[int]) -> dict[str, Any]:
        """Which of their states counts, by client, and which they must keep."""
        since = {client: self.side.round_of(client) for client in clients}
        keeps = self.folder is not None and any(isinstance(c, Checkpoint) for c in self.trainer.callbacks)
        return {"since": since, "keep": {c: self._durable.get(c, -1) if keeps else r for c, r in since.items()}}

    def save_checkpoint(self, path: Path, content: dict[str, Any], wait: bool = True) -> None:
        """Write a snapshot. Only when another one is begun is it sure to be on disk."""
        super().save_checkpoint(path, content, wait)
        if path.stem == "last":
            rounds = {client: self.side.round_of(client) for client in range(self.federation.num_clients)}
            self._durable, self._written = self._written, rounds


class ServerTrainer(FederatedTrainer):
    """A trainer whose clients live at sites, by whose data Hessians may be measured."""

    session_class = ServerSession
    sites: Sites
    measures_at_sites = False

    @property
    def remote_operator(self) -> Any:
        """Makes the Hessian over all sites' data; None where the server has them as well."""
        return partial(SiteHessian, self._session) if self.measures_at_sites else None


def check_deployable(trainer: FederatedTrainer, datamodule: FederatedDataModule, model: LightningModule) -> None:
    """Refuse what only a simulation can do, and personal parts that the model does not have, by key."""
    settings = trainer.settings
    colluding = [type(attack).__name__ for attack in attacks_by(settings["transforms"]) if attack.colludes]
    for key in (key for key in ("centralized", "fast_dev_run") if settings[key]):
        raise MisconfigurationException(f"trainer.{key}=true has no clients at sites. Set it to false.")
    if colluding:
        why = "attackers know one another's updates, which sites do not. Leave it to simulations."
        raise MisconfigurationException(f"trainer.transforms: {colluding[0]}: {why}")
    if datamodule.held_out_clients:
        why = "clients that never train have no site. Set it to 0; new sites may come at any time."
        raise MisconfigurationException(f"data.held_out_clients: {why}")
    if not (overrides(model, "configure_model") or overrides(model, "setup")):  # then it has all of its parts
        trainer.personal.setup(model, ParameterLayout.of(model))


def serve(config: Path, options: Mapping[str, Any], transport: Transport) -> ServerTrainer:
    """Run the server of an app.

    Options are ``rounds``, ``seed``, ``folder``, ``resume``, ``timeout``, ``wait``, ``min-results``; ``data``, which is
    ``experiment`` where clients are parts of the configuration's data, and ``sites`` where sites have their own, of so
    many ``clients``; ``spectrum``: ``sites`` lets HessianSpectrum measure there.
    """
    cli = build(config, ServerTrainer, options, site=False)
    trainer: ServerTrainer = cli.trainer  # type: ignore[assignment]
    trainer.callbacks.append(_Crossed())
    data: FederatedDataModule = cli.datamodule
    check_deployable(trainer, data, cli.model)
    trainer.sites = Sites(transport, options)
    trainer.sites.gather()
    found = trainer.sites.found
    if options.get("data") == "sites":
        data = RemoteData([found[c]["sizes"][str(c)] for c in sorted(found)], found[0]["batch_size"])
    trainer.measures_at_sites = "sites" in (options.get("data"), options.get("spectrum"))
    rank_zero_info(f"sites: {len(set(trainer.sites.homes.values()))} nodes with {len(found)} clients.")
    trainer.fit(cli.model, data, ckpt_path=options.get("resume") or None)
    return trainer

"""The server between two rounds: its state, its clients' state, and what a round does to them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from fedlight._results import checksum, round_metrics
from fedlight.aggregation import average_buffers
from fedlight.algorithms.base import Algorithm
from fedlight.clients import ClientStore, reweighed, running_mean
from fedlight.data.arrays import in_memory
from fedlight.data.datamodule import FederatedDataModule
from fedlight.engines.base import ClientTask, named
from fedlight.local import ClientResult
from fedlight.parameters import ParameterLayout
from fedlight.perturbations.base import Perturbation, State

BufferPolicy = Literal["average", "local", "reset"]
View = Literal["server", "selected", "all"]


@dataclass
class ServerState:
    """All that the server knows after some rounds, besides the clients' rows.

    Attributes:
        round: rounds that are complete.
        global_step: local steps of all clients so far.
        algorithm: the algorithm's state; ``params`` is the server's model.
        perturbation: the perturbation's state.
        buffers: the model's buffers.
        views: the weights that are evaluated, by name, ``[P]`` each.
        latest_mean: ``params``, the mean over every client's latest model, ``[P]`` float64, ``initial``, the model
            before the first round, ``[P]``, and ``shares``, what each client weighs in that mean, ``[N]`` float64;
            empty unless view ``all`` is kept.
        loss_scale: where 16-bit mixed precision starts in the next round.
    """

    round: int = 0
    global_step: int = 0
    algorithm: State = field(default_factory=dict)
    perturbation: State = field(default_factory=dict)
    buffers: State = field(default_factory=dict)
    views: State = field(default_factory=dict)
    latest_mean: State = field(default_factory=dict)
    loss_scale: float = 65536.0


class Federation:
    """Turns clients into tasks, and their results into the next server state.

    Every process holds the same federation: it computes the same from the same results.

    Args:
        algorithm: how clients are corrected and aggregated.
        perturbation: where gradients are taken, or None.
        datamodule: the clients' data, set up.
        store: the clients' rows.
        buffer_policy: what happens to the module's buffers.
        views: which weights are evaluated.
        layout: the order of the parameters.
    """

    read = False
    """Whether datasets are read into memory, for an engine that takes no others."""

    def __init__(
        self,
        algorithm: Algorithm,
        perturbation: Perturbation | None,
        datamodule: FederatedDataModule,
        store: ClientStore,
        buffer_policy: BufferPolicy,
        views: Sequence[View],
        layout: ParameterLayout,
    ) -> None:
        self.algorithm, self.perturbation = algorithm, perturbation
        self.datamodule, self.store = datamodule, store
        self.buffer_policy, self.views = buffer_policy, views
        self.num_clients = datamodule.num_clients
        self.sizes = torch.tensor([datamodule.client_size(i) for i in range(self.num_clients)])
        self._sizes = self.sizes.numpy()  # reads one entry in a fraction of the time
        self._mean_size = float(self.sizes.double().mean())
        self.initial_buffers: State = {}
        weights = [algorithm.mean_weight(n) for n in self.sizes.tolist()] if "all" in views else [1.0]
        self._shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        algorithm.setup(self.num_clients, layout)
        if perturbation is not None:
            perturbation.setup(layout)
        self.state = ServerState()

    def initialise(self, params: Tensor, buffers: State) -> None:
        """Begin with a model: its flat parameters ``[P]`` and its buffers."""
        self.initial_buffers = {k: v.clone() for k, v in buffers.items()}
        latest = {"params": params.double(), "initial": params, "shares": self._shares}
        self.state = ServerState(
            algorithm=self.algorithm.init_server(params),
            perturbation={} if self.perturbation is None else self.perturbation.init_server(params),
            buffers=buffers,
            views=dict.fromkeys(self.views, params),
            latest_mean=latest if "all" in self.views else {},
        )

    @property
    def params(self) -> Tensor:
        """The server's model, ``[P]``."""
        return self.state.algorithm["params"]

    def _client(self, client: int) -> State:
        state = self.store.get(client, "algorithm")
        return self.algorithm.init_client(self.params) if state is None else state

    def _client_perturbation(self, client: int) -> State:
        if self.perturbation is None:
            return {}
        state = self.store.get(client, "perturbation")
        return self.perturbation.init_client(self.params) if state is None else state

    def _weight(self, client: int) -> float:
        return float(self._sizes[client]) / self._mean_size

    def start(self, client: int) -> Tensor:
        """Where a client's training starts in this round, ``[P]``."""
        return self.algorithm.objective(self.state.algorithm, self._client(client), self._weight(client)).start

    def tasks(self, clients: Sequence[int], lrs: tuple[float, ...] | None) -> list[ClientTask]:
        """What the clients have to do in this round."""
        return [self._task(client, lrs) for client in clients]

    def _task(self, client: int, lrs: tuple[float, ...] | None) -> ClientTask:
        objective = self.algorithm.objective(self.state.algorithm, self._client(client), self._weight(client))
        perturbation: State = {}
        if self.perturbation is not None:
            own = self._client_perturbation(client)
            perturbation = self.perturbation.begin(self.state.perturbation, own, objective.start)
        with named(self.state.round, client):
            dataset = in_memory(self.datamodule.client_dataset(client), self.datamodule.collate_fn, self.read)
        return ClientTask(
            client=client,
            objective=objective,
            dataset=dataset,
            weight=self._weight(client),
            buffers=self.buffers_of(client),
            perturbation=perturbation,
            lrs=lrs,
            loss_scale=self.state.loss_scale,
        )

    def buffers_of(self, client: int) -> State:
        """What a client's training starts from."""
        if self.buffer_policy == "reset":
            return self.initial_buffers
        if self.buffer_policy == "local":
            own = self.store.get(client, "buffers")
            return self.initial_buffers if own is None else {**self.initial_buffers, **own}
        return self.state.buffers

    def finite(self, results: Sequence[ClientResult]) -> list[ClientResult]:
        """The results whose parameters and buffers are finite; others are named in a warning.

        Raises:
            FloatingPointError: if none is.
        """
        flags = torch.stack([checksum(r) for r in results]).isfinite().tolist()
        bad = [r.client for r, ok in zip(results, flags, strict=True) if not ok]
        if len(bad) == len(results):
            raise FloatingPointError(
                f"round {self.state.round}: the update of every client ({bad}) is NaN or infinite."
                " Lower the learning rate, or set trainer.gradient_clip_val."
            )
        if bad:
            rank_zero_warn(f"round {self.state.round}: left out clients {bad}, whose update is NaN or infinite.")
        return [r for r, ok in zip(results, flags, strict=True) if ok]

    def aggregate(self, results: Sequence[ClientResult]) -> None:
        """Complete the round: clients' rows, then the server's state. ``results`` are in client order."""
        old, messages = self.state, []
        for r in results:
            state, message = self.algorithm.client_update(old.algorithm, self._client(r.client), r)
            self.store.put(r.client, "algorithm", state)
            messages.append(message)
        perturbation = old.perturbation
        if self.perturbation is not None:
            for r in results:
                own = self._client_perturbation(r.client)
                updated = self.perturbation.client_update(old.perturbation, own, r.perturbation, r.start)
                self.store.put(r.client, "perturbation", updated)
            perturbation = self.perturbation.aggregate(old.perturbation, [r.perturbation for r in results])
        algorithm = self.algorithm.aggregate(old.algorithm, results, messages)
        latest = self._update_latest(results)
        views = self.algorithm.evaluated(algorithm, results)
        if torch.equal(views["server"], views["selected"]):
            views["selected"] = views["server"]  # one vector, one evaluation
        if latest:
            views["all"] = latest["params"].to(algorithm["params"].dtype)
        scales = [r.loss_scale for r in results if r.loss_scale is not None]
        self.state = ServerState(
            round=old.round + 1,
            global_step=old.global_step + sum(r.num_steps for r in results),
            algorithm=algorithm,
            perturbation=perturbation,
            buffers=self._aggregate_buffers(results),
            views={view: views[view] for view in self.views},
            latest_mean=latest,
            loss_scale=min(scales, default=old.loss_scale),
        )

    def _aggregate_buffers(self, results: Sequence[ClientResult]) -> State:
        if not results[0].buffers:
            return {}
        if self.buffer_policy == "local":
            for r in results:
                self.store.put(r.client, "buffers", r.buffers)
        weights = [self.algorithm.mean_weight(r.num_samples) for r in results]
        return average_buffers([r.buffers for r in results], weights)

    def _update_latest(self, results: Sequence[ClientResult]) -> State:
        if "all" not in self.views:
            return {}
        rows, mean = [], self.state.latest_mean
        for r in results:
            old = self.store.get(r.client, "latest")  # the model before the first round where it has not trained
            rows.append((r.params, mean["initial"] if old is None else old["params"], float(self._shares[r.client])))
            self.store.put(r.client, "latest", {"params": r.params})
        return {**mean, "params": running_mean(rows, mean["params"])}

    def metrics(self, results: Sequence[ClientResult], left_out: int) -> dict[str, Tensor | float]:
        """What the clients logged, reduced over them by samples seen, and the figures of the round."""
        down, up = self.communication(len(results) + left_out)
        return {**round_metrics(results, left_out), "comm/down_mb": down, "comm/up_mb": up}

    def communication(self, clients: int) -> tuple[float, float]:
        """Megabytes (10^6 bytes) that the server sends to, and receives from, the clients of one round."""
        vector = self.params.numel() * self.params.element_size()
        exchanged = self.buffer_policy == "average"
        buffers = sum(v.numel() * v.element_size() for v in self.state.buffers.values()) if exchanged else 0
        down, up = self.algorithm.down_vectors, self.algorithm.up_vectors
        if self.perturbation is not None:
            down, up = down + self.perturbation.down_vectors, up + self.perturbation.up_vectors
        return clients * (down * vector + buffers) / 1e6, clients * (up * vector + buffers) / 1e6

    def num_bytes(self) -> int:
        """Size of what a checkpoint holds at least."""
        tensors = {id(v): v for part in vars(self.state).values() if isinstance(part, dict) for v in part.values()}
        return sum(v.numel() * v.element_size() for v in tensors.values())

    def state_dict(self) -> dict[str, Any]:
        """Server state and client rows, in plain tensors and Python values."""
        return {
            "server": {k: dict(v) if isinstance(v, dict) else v for k, v in vars(self.state).items()},
            "initial_buffers": dict(self.initial_buffers),
            "clients": self.store.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any], clients: bool = True, anew: bool = False) -> None:
        """Continue from :meth:`state_dict`.

        Args:
            saved: the state.
            clients: whether the clients' rows are needed; evaluation needs none.
            anew: count rounds and steps from there, and leave the rest as it has been initialised.

        Raises:
            MisconfigurationException: if the algorithm keeps something else.
        """
        if anew:
            self.state.round, self.state.global_step = saved["server"]["round"], saved["server"]["global_step"]
            return
        device = self.params.device
        expected = {k: v.shape for k, v in self.state.algorithm.items()}
        found = {k: v.shape for k, v in saved["server"]["algorithm"].items()}
        if clients and expected != found:
            raise MisconfigurationException(f"ckpt_path: the algorithm keeps {expected}, the checkpoint has {found}.")
        self.initial_buffers = _to(saved["initial_buffers"], device)
        server: dict[str, Any] = {k: _to(v, device) if isinstance(v, dict) else v for k, v in saved["server"].items()}
        self.state = ServerState(**server)
        if clients:
            self.store.load_state_dict(saved["clients"])
            mean = self.state.latest_mean
            if mean and not ("shares" in mean and torch.equal(mean["shares"].cpu(), self._shares)):
                rank_zero_info("ckpt_path: its view `all` weighs clients otherwise than here, and is summed up anew.")
                self.state.latest_mean = mean = reweighed(mean, self._shares, self.store)
                self.state.views["all"] = mean["params"].to(self.params.dtype)


def _to(state: State, device: torch.device | str) -> State:
    return {k: v.detach().to(device) for k, v in state.items()}

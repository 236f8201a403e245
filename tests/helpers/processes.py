"""Cases that give the same in one process and in two.

``torchrun --standalone --nproc_per_node 2 -m tests.helpers.processes FOLDER`` runs all of them in one process group;
``python -m tests.helpers.processes FOLDER launch`` lets Fabric start the second process, trains, tests, and is stopped
by a SIGTERM that the first process alone receives; ``FOLDER many`` runs some cases in any number of processes.
"""

import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn
from torchmetrics import MeanMetric, MeanSquaredError

from fedlight.algorithms.fedavg import FedAvg
from fedlight.algorithms.scaffold import SCAFFOLD
from fedlight.callbacks import ClientMetrics
from fedlight.personal import APFL, FineTune, PersonalParts, PFedMe
from fedlight.perturbations import SAM
from fedlight.run.loggers import read_metrics
from fedlight.server.sampling import Bernoulli
from fedlight.transforms import DifferentialPrivacy
from tests.helpers.tiny import Clients, Drawing, Regression, quiet_trainer, weights

SIZES = (6, 12, 8, 3, 7)


class Measured(Regression):
    """BatchNorm, dropout, and metrics of every kind in training and evaluation."""

    def __init__(self) -> None:
        layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.2), nn.Linear(4, 1)
        super().__init__(net=nn.Sequential(*layers))
        self.mse, self.val_mse, self.by_hand = MeanSquaredError(), MeanSquaredError(), MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.mse(self(batch[0]).detach(), batch[1])
        self.log("train/mse", self.mse)
        self.by_hand.update(batch[1])
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("train/target", self.by_hand.compute())
        self.by_hand.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.val_mse.update(self(batch[0]), batch[1])
        self.log("val/mse", self.val_mse)
        self.log("val/accuracy", (self(batch[0]) > batch[1]).float().mean())
        self.log("val/largest", batch[1].max(), reduce_fx="max")


class Remembering(Regression):
    """Evaluation draws, goes on from the batch before, and keeps outputs; a parameter is a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.hidden, self.outputs = nn.Parameter(torch.ones(())), torch.zeros(()), list[torch.Tensor]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * super().forward(x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.hidden = self.hidden / 2 + self(batch[0]).mean()
        self.log("val/noisy", self.hidden + torch.randn(()) + random.random())
        self.outputs.append(self(batch[0]))

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.hidden = self.hidden / 2 + self(batch[0]).mean()
        return self(batch[0]) + self.hidden

    def on_validation_epoch_end(self) -> None:
        self.log_dict({"val/median": torch.cat(self.outputs).median(), "val/drawn": torch.rand(())})
        self.outputs.clear()


class SmallNet(Regression):
    """What ``engine: auto`` trains side by side."""

    def __init__(self) -> None:
        super().__init__(net=nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 1)))


class Own(Clients):
    """Every client has validation data of its own."""

    def client_val_dataset(self, client: int) -> Any:
        return self.client_dataset(client)


class Middle(FedAvg):
    """The median model, without sums."""

    collects = True

    def aggregate(self, server: Any, total: Any) -> Any:
        return {"params": total["models"].median(0).values}


class Terminate(Callback):
    """The first process alone is told to stop in the second round."""

    def on_client_end(self, trainer: Any, pl_module: Any, client: int) -> None:
        if trainer.is_global_zero and trainer.current_round == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def diverging() -> Own:
    data = Own(SIZES)
    data.datasets[1] = data.dataset(torch.full((4, 3), 1e25), torch.zeros(4))
    return data


class DrawingClients(Own):
    """Read sample by sample, with noise."""

    dataset = staticmethod(Drawing)


CASES: dict[str, dict[str, Any]] = {
    "all kinds of metrics": {"clients_per_round": 3, "max_rounds": 3},
    "one client, so one process is idle": {"clients_per_round": 1, "personal": lambda: PFedMe(2.0, 2)},
    "two bounds of batches": {"limit_val_batches": 2, "limit_train_batches": 1},
    "fewer batches than processes": {"limit_val_batches": 1},
    "local statistics and state on disk": {"algorithm": SCAFFOLD, "client_state": "disk", "buffers": "local"},
    "perturbed": {"perturbation": lambda: SAM(0.05), "views": ["server"]},
    "a client diverges": {"data": diverging, "model": Regression, "clients_per_round": 1.0},
    "all models at once": {"algorithm": lambda: Middle(), "clients_per_round": 3},
    "side by side": {
        "model": SmallNet,
        "data": lambda: Own((10,) * 8 + (7, 7, 9)),
        "clients_per_round": 9,
        "resume": 2,
    },
    "resumed": {"resume": 2, "max_rounds": 4, "personal": lambda: PersonalParts(["BatchNorm", "head"], "alternating")},
    "evaluation that draws and remembers": {"model": Remembering, "resume": 2},
    "data that draws": {"data": lambda: DrawingClients(SIZES)},
    "own models, new clients": {
        "personal": lambda: APFL(0.4, adaptive=True),
        "data": lambda: Own(SIZES, held_out_clients=1),
        "resume": 2,
    },
    "fine-tuned": {
        "personal": lambda: FineTune(steps=2),
        "data": lambda: Own(SIZES, held_out_clients=1),
        "max_rounds": 2,
    },
}

if find_spec("dp_accounting"):  # of five rounds one is empty, and of two processes one has no client in most
    chain = [DifferentialPrivacy(0.2, noise_multiplier=1.0)]
    few = {"sampler": Bernoulli(redraw=False), "clients_per_round": 1, "max_rounds": 5}
    CASES["private"] = {"transforms": chain, "model": Regression, **few}

MANY = [
    "all kinds of metrics",
    "side by side",
    "local statistics and state on disk",
    "a client diverges",
    "all models at once",
]
"""Cases for more processes than two; in some rounds there are fewer clients."""


PARTS = ("algorithm", "perturbation", "personal", "buffers", "latest")


def outcome(case: str, folder: Path, devices: int, more: int = 0) -> dict[str, Any]:
    """What a case ends with in this process: weights, statistics, metrics, warnings, rows that are kept here.

    Trains some rounds ``more``, and continues a run that there is.
    """
    settings = {"devices": devices, "name": case, "max_rounds": 3, "callbacks": [ClientMetrics()], **CASES[case]}
    settings["max_rounds"] += more
    settings["enable_plots"] = case == "all kinds of metrics"  # a picture takes longer than such a run
    data, model = settings.pop("data", lambda: Own(SIZES)), settings.pop("model", Measured)
    resume = settings.pop("resume", None)
    for key in ("algorithm", "perturbation", "personal"):
        if key in settings:
            settings[key] = settings[key]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if resume is not None:
            quiet_trainer(folder, **{**settings, "max_rounds": resume}).fit(model(), data())
        module = model()
        trainer = quiet_trainer(folder, **settings)
        trainer.fit(module, data(), ckpt_path="last" if resume or (more and (folder / case).exists()) else None)
        store = trainer._session.federation.store
        kept = {i: {part: store.get(i, part) for part in PARTS} for i in store.clients()}
        tested = trainer.test(module, data(), verbose=False)
        predicted = trainer.predict(module, data())
    rows = read_metrics(trainer.run_dir / "metrics.csv")
    return {
        "world": trainer.world_size,
        "weights": weights(module),
        "kept": {i: {part: state for part, state in row.items() if state} for i, row in kept.items()},
        "views": trainer._session.federation.state.views,
        "rows": [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows],
        "clients": (trainer.run_dir / "clients.csv").read_text(),
        "tested": tested,
        "predicted": predicted,
        "left out": [str(w.message) for w in caught if "left out" in str(w.message)],
    }


def failing(folder: Path, devices: int) -> str:
    """The error of a run in which every client diverges."""
    data = Own((4, 4))
    data.datasets = [data.dataset(torch.full((4, 3), 1e25), torch.zeros(4)) for _ in range(2)]
    try:
        quiet_trainer(folder, devices=devices, name="fails", enable_plots=False).fit(Regression(), data)
    except FloatingPointError as error:
        return str(error)
    return "no error"


def stopped(folder: Path, devices: int) -> int:
    """The exit code of a run that is told to stop."""
    try:
        quiet_trainer(
            folder, devices=devices, name="stopped", callbacks=[Terminate()], max_rounds=9, enable_plots=False
        ).fit(Regression(), Clients(SIZES))
    except SystemExit as stop:
        return int(stop.code or 0)
    return -1


def everything(folder: Path, devices: int) -> dict[str, Any]:
    """The outcome of every case."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {case: outcome(case, folder, devices) for case in CASES}
    return found | {"fails": failing(folder, devices), "stopped": stopped(folder, devices)}


def _save(make: Callable[[], Any], folder: Path) -> None:
    found = make()
    torch.save(found, folder / f"rank{os.environ.get('LOCAL_RANK', 0)}.pt")


if __name__ == "__main__":
    where = Path(sys.argv[1])
    if sys.argv[2:] == ["launch"]:
        torch.set_num_threads(1)
        _save(lambda: outcome("all kinds of metrics", where, 2), where)
        sys.exit(stopped(where, 2))
    if sys.argv[2:] == ["many"]:
        torch.set_num_threads(1)
        world = int(os.environ["WORLD_SIZE"])
        _save(lambda: {case: outcome(case, where, world) for case in MANY}, where)
    else:
        _save(lambda: everything(where, 2), where)
    torch.distributed.destroy_process_group()

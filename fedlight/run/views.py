"""Evaluation of the weights that are of interest after a round, and what watches its metrics."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from fedlight.data.reading import class_names
from fedlight.module.hooks import overrides
from fedlight.module.parameters import load_flat_parameters, load_tensors
from fedlight.personal.base import Personalization
from fedlight.run.context import RunContext
from fedlight.run.evaluation import Stage
from fedlight.run.loggers import tell_wandb
from fedlight.run.names import as_floats, client_names, nearest, over_clients
from fedlight.run.wandb import log_confusion

Row = dict[str, Tensor | float]


class Views:
    """Evaluates the views of a run's federation, loaded into its module, with its evaluator.

    Attributes:
        logged: what the module logs in validation, in its order; empty before the first one.
        clients: what it logs on the clients' own data, by client; empty in a round without such an evaluation.
    """

    def __init__(self, run: RunContext) -> None:
        self._run, self._settings = run, run.settings
        self.logged: list[str] = []
        self.clients: dict[int, dict[str, float]] = {}

    def load(self, view: str) -> None:
        """Put a view's weights and the server's buffers into the module."""
        run = self._run
        load_flat_parameters(run.module, run.federation.state.views[view], run.layout)
        load_tensors(run.module, run.federation.state.buffers)

    def choose(self, view: str) -> None:
        """Put a view that somebody asked for into the module.

        Raises:
            MisconfigurationException: if there is no such view.
        """
        known = list(self._run.federation.state.views) if self._run.resumed else ["server"]
        if view not in known:
            source = self._run.checkpoint_path if self._run.resumed else "a module as it is"
            raise MisconfigurationException(f"view={view!r}: {source} has the views {known}.")
        self.load(view)

    def find_losses(self, clients: Sequence[int]) -> None:
        """Let clients know the loss of the model that they start from, where the algorithm needs it."""
        run, side = self._run, self._run.federation.clients
        if not run.trainer.algorithm.needs_loss:
            return
        side.losses = {}
        for task in (side.task(client, None) for client in clients):
            load_flat_parameters(run.module, task.objective.start, run.layout)
            load_tensors(run.module, task.buffers)
            side.losses[task.client] = run.evaluator.loss(task.dataset)

    @property
    def due(self) -> bool:
        """Whether there is an evaluation after the round that was just aggregated."""
        return self.is_last or self._run.trainer.current_round % self._settings["check_val_every_n_rounds"] == 0

    def may_follow(self, name: str) -> bool:
        """Whether a later round may have a metric that this one lacks: of views, clients or callbacks that wait."""
        run, asked = self._run, self._settings["client_val_every_n_rounds"] != 0
        swa = name.endswith("_swa") and "swa" in run.federation.views
        clients = name.startswith("clients/") and asked and not self.clients and run.evaluator.clients_log is not False
        return not self.is_last and bool(swa or clients or run.hooks.overridden("on_round_metrics"))

    @property
    def is_last(self) -> bool:
        """Whether the round that was just aggregated is the last one."""
        trainer = self._run.trainer
        return trainer.current_round >= trainer.max_rounds or trainer.should_stop

    def log_confusion(self, logger: Any, stage: Stage = "validation") -> None:
        """Give W&B what a classifier takes for what, if the module tells its classes and predicts them."""
        run, classes = self._run, getattr(self._run.module, "num_classes", None)
        dataset, limit = self._data(stage)
        if isinstance(classes, int) and dataset is not None and overrides(run.module, "predict_step"):
            names = class_names(run.datamodule) or [str(number) for number in range(classes)]
            log_confusion(logger, stage.removesuffix("idation"), run.evaluator.classified(dataset, limit), names)

    def evaluate_round(self) -> Row:
        """Evaluate views and clients, where this round is due."""
        self.clients = {}
        defined = overrides(self._run.module, "validation_step")
        if not self.due or not defined or self._settings["limit_val_batches"] == 0:
            return {}
        state = self._run.trainer.state
        state.stage = RunningStage.VALIDATING
        metrics = self._evaluate("validation") | self._evaluate_clients()
        state.stage = RunningStage.TRAINING
        return metrics

    def evaluate(self, stage: Stage) -> dict[str, float]:
        """Evaluate the views once, for ``validate`` and ``test``.

        Raises:
            MisconfigurationException: if module or data have nothing for this stage.
        """
        run = self._run
        if not overrides(run.module, f"{stage}_step"):
            raise MisconfigurationException(f"model: {type(run.module).__name__} does not define {stage}_step.")
        metrics = as_floats(self._evaluate(stage))
        if not metrics and self._data(stage)[0] is None:
            raise MisconfigurationException(f"data: {type(run.datamodule).__name__} has no {stage} data.")
        self.load("server")
        tell_wandb(run.loggers, lambda logger: self.log_confusion(logger, stage))
        return metrics

    def _data(self, stage: Stage) -> tuple[Dataset[Any] | None, int | float | None]:
        """What is evaluated, and at most so many batches of it."""
        data, settings = self._run.datamodule, self._settings
        if stage == "validation":
            return data.val_dataset(), settings["limit_val_batches"]
        return data.test_dataset(), settings["limit_test_batches"]

    def _evaluate(self, stage: Stage) -> Row:
        run, (dataset, limit) = self._run, self._data(stage)
        if dataset is None:
            return {}
        views = run.federation.state.views
        if run.command != "fit" and not run.resumed:  # nothing but the caller's module is known
            views = {"server": views["server"]}
        done: dict[int, dict[str, Tensor]] = {}
        out: Row = {}
        for view, params in views.items():
            if id(params) not in done:
                self.load(view)
                quiet = view != "server"
                publish = None if quiet else run.publish
                before = {name: _written(buffer) for name, buffer in run.module.named_buffers()}
                done[id(params)] = run.evaluator.run(dataset, stage, limit, quiet=quiet, publish=publish)
                if run.command == "fit" and not quiet:
                    after = run.module.named_buffers()
                    run.federation.keep_buffers({k: v for k, v in after if _written(v) != before.get(k)})
            suffix = "" if view == "server" else f"_{view}"
            out |= {f"{name}{suffix}": value for name, value in done[id(params)].items()}
        self.logged = list(done[id(views["server"])])
        return out

    def _evaluate_clients(self) -> Row:
        run, every = self._run, self._settings["client_val_every_n_rounds"]
        count, rounds = run.federation.num_clients, run.trainer.current_round
        if every == 0:
            return {}
        if every is None:
            every = 1 if count <= 200 else rounds + 1
        if rounds % every and not self.is_last:
            return {}
        self.clients = self.on_clients()
        return {**over_clients(self.clients)}

    def on_clients(self) -> dict[int, dict[str, float]]:
        """What validation logs on each client's own data, by client."""
        self.load("server")
        found = evaluate_clients(self._run)
        self.load("server")
        return found


def evaluate_clients(run: RunContext, clients: Sequence[int] | None = None) -> dict[int, dict[str, float]]:
    """What validation logs on each client's own data, by client; of all by default.

    The server's model, which the module holds, gives what is logged its own names. With the client's own model
    ``val/accuracy`` is ``personal_accuracy``, and ``new_accuracy`` for a client that never trains.
    """
    count, limit = run.federation.num_clients, run.settings["limit_val_batches"]
    clients = range(count + len(run.datamodule.new_clients)) if clients is None else clients
    found = run.evaluator.client_metrics(clients, limit)
    names = client_names(found)
    own = {client: metrics for client, metrics in found.items() if client >= count}
    if type(run.trainer.personal) is not Personalization:
        own = run.evaluator.client_metrics(list(found), limit, lambda clients: _in_turn(run, clients))
    for client, metrics in own.items():
        kind, before = ("new", {}) if client >= count else ("personal", found[client])
        found[client] = before | {f"{kind}_{names.get(name, name)}": value for name, value in metrics.items()}
    return found


def _in_turn(run: RunContext, clients: Sequence[int]) -> Iterator[int]:
    """Those of the clients whose rows this process has, and its share of the others, with their models in the module.

    What is trained for that is forgotten. Callbacks hear nothing of it, as of all evaluations but the server's.
    """
    federation, world = run.federation, run.fabric.world_size
    owners, side, lrs = federation.rows.owners, federation.clients, run.schedule.lrs
    mine = [c for c in clients if (owners[c] if c < len(owners) else c % world) == run.fabric.global_rank]
    side.begin(federation.state)
    together = max(1, run.trainer.sampler.clients_per_round // world)
    for some in (mine[i : i + together] for i in range(0, len(mine), together)):
        tasks = [task for client in some if (task := side.adapting(client, lrs)) is not None]
        run.hooks.quiet, run.trainer.state.stage = True, RunningStage.TRAINING
        results = {r.client: r for r in (run.engine.train(run.trainer.current_round, tasks) if tasks else ())}
        run.hooks.quiet, run.trainer.state.stage = False, RunningStage.VALIDATING
        for client in some:
            result, server = results.get(client), federation.state.views["server"]
            held = side.personal_model(client, server) if result is None else side.adapted(result)
            load_flat_parameters(run.module, held.pop(""), run.layout)
            load_tensors(run.module, held)
            yield client


def _written(buffer: Tensor) -> tuple[int, int]:
    """Differs once a buffer is replaced or written to; nobody waits for its device."""
    return id(buffer), -1 if buffer.is_inference() else buffer._version


@contextmanager
def monitors_known(run: RunContext) -> Iterator[None]:
    """Look whether the round has what is monitored; inside, the round is saved.

    Raises:
        MisconfigurationException: on leaving, if an evaluated round lacks it, no later one may have it, and what
            monitors it is ``strict``.
    """
    trainer, views, wrong = run.trainer, run.trainer.views, ""
    watching: list[tuple[str, Any]] = [
        ("trainer.callbacks: EarlyStopping", c) for c in trainer.callbacks if isinstance(c, EarlyStopping)
    ]
    plateaus = [s for s in run.schedule.schedulers if s.reduce_on_plateau]
    watching += [(f"model.configure_optimizers: {type(s.scheduler).__name__}", s) for s in plateaus]
    for where, what in watching:
        name = str(what.monitor)
        if views.due and name not in run.fresh and not views.may_follow(name):
            logged = sorted(n for n in run.fresh if not n.startswith("time/"))
            near = nearest(name, logged) or "."
            text = f"{where}.monitor={name!r} was not logged{near} Logged are {', '.join(logged)}."
            if what.strict and trainer.current_round < trainer.max_rounds:
                wrong = text
            else:
                rank_zero_warn(f"{text} Nothing comes of it.")
    trainer.should_stop = trainer.should_stop or bool(wrong)  # the round is saved as a last one is
    yield
    if wrong:
        saved = "" if trainer.run_dir is None else " The rounds so far are saved; --ckpt_path last goes on from there."
        raise MisconfigurationException(wrong + saved)

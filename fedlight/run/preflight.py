"""Checks that need the module, the data and the device together, made before the first round."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, Subset

from fedlight.data.arrays import ArrayDataset, in_memory
from fedlight.data.datamodule import first_samples
from fedlight.data.federated import given_data
from fedlight.data.reading import is_hf, picks_one
from fedlight.module.hooks import overrides, strangers
from fedlight.module.optimizers import RoundSchedule, check_schedules
from fedlight.penalties.numbers import follow
from fedlight.personal.parts import PersonalParts
from fedlight.run.attempt import LossesSaid, check_gradient, prepared, trial_step
from fedlight.run.context import RunContext
from fedlight.run.labels import check_finite, check_labels, check_vocabulary, extreme_labels
from fedlight.server.federation import Federation
from fedlight.server.incoming import check_enough
from fedlight.server.sampling import WeightedBySamples, draw
from fedlight.transforms.attack import attacks_by

_MISFITS = (RuntimeError, IndexError, KeyError, TypeError, ValueError, AttributeError, AssertionError)
"""What a step raises that was not made for its batch."""


def check_methods(run: RunContext) -> None:
    """Refuse methods, optimizer and clients that do not fit together; no data are looked at.

    Raises:
        MisconfigurationException: naming the keys.
    """
    trainer, federation = run.trainer, run.federation
    check_schedules(run.module, federation.sizes.tolist(), trainer)
    _check_algorithm(federation, run.schedule)
    follow(trainer.scheduled, trainer.current_round, run.fabric.device)
    for tensor in trainer.scheduled:
        if (last := tensor.schedule.get("after", 0) + tensor.schedule["rounds"]) > trainer.max_rounds:
            rank_zero_info(f"{tensor.key}: its schedule ends after {last} rounds, and training before.")
    _check_enough(trainer, federation)
    settings, personal, swa = run.settings, trainer.personal, ("swa" in run.settings["views"], "views has no `swa`")
    _say_idle(settings, "swa_start", 0.75, *swa)
    _say_idle(settings, "swa_every_n_rounds", 1, *swa)
    clips = settings["gradient_clip_val"] is not None
    _say_idle(settings, "gradient_clip_algorithm", "norm", clips, "gradient_clip_val is null")
    evaluates = settings["limit_val_batches"] != 0
    _say_idle(settings, "client_val_every_n_rounds", None, evaluates, "limit_val_batches is 0")
    if isinstance(personal, PersonalParts) and personal.epochs != 1 and not personal.trains_apart:
        rank_zero_info(f"trainer.personal.epochs={personal.epochs} changes nothing, as no part alternates.")
    if trainer.idle:
        rank_zero_info(f"trainer.centralized: {', '.join(trainer.idle)} play no part, as there are no clients.")


def _say_idle(settings: Mapping[str, Any], key: str, default: Any, acts: bool, why: str) -> None:
    if settings[key] != default and not acts:
        rank_zero_info(f"trainer.{key}={settings[key]!r} changes nothing, as {why}.")


def check_data(run: RunContext) -> None:
    """Refuse data that model and settings cannot be trained with.

    Raises:
        MisconfigurationException: naming the keys that do not fit together.
    """
    module, datamodule, sizes = run.module, run.datamodule, run.federation.sizes
    _check_client_data(run)
    labels = extreme_labels(datamodule)
    check_labels(run, labels)
    client = int(sizes.nonzero()[0])  # clients of a partition share their storage: one shows it all
    data = datamodule.client_dataset(client), datamodule.val_dataset(), datamodule.test_dataset()
    kind, anew = type(data[0]), datamodule.client_dataset(client) is not data[0]
    if anew and not is_hf(data[0]) and kind.__module__.split(".")[0] not in ("torch", "fedlight"):
        what = f"{type(given_data(datamodule)).__name__}.client_dataset makes a {kind.__name__} at every call"
        rank_zero_info(f"data: {what}, in each round again. Where that reads files, keep what it made.")
    how = datamodule.collate_fn, datamodule.eval_collate_fn, datamodule.eval_collate_fn
    sets = [d for d in map(in_memory, data, how) if isinstance(d, ArrayDataset)]
    _say_idle(run.settings, "tf32", None, run.fabric.device.type == "cuda", f"the device is {run.fabric.device}")
    kept = [*module.buffers(), *(p for p in module.parameters() if not p.requires_grad)]
    _say_idle(run.settings, "buffers", "average", bool(kept), "the model has none")
    if run.settings["channels_last"]:
        images = any(getattr(leaf, "ndim", 0) == 4 for leaf in tree_leaves(first_samples(datamodule, client, 1)))
        _say_idle(run.settings, "channels_last", False, images, "no batch has images [B, C, H, W]")
    size = datamodule.eval_batch_size_on(run.fabric.device)
    _refuse_picking("batch_size", datamodule.batch_size, data[0], datamodule.collate_fn)
    _refuse_picking("eval_batch_size", size, data[1], datamodule.eval_collate_fn)
    check_finite(sets)
    check_vocabulary(module, sets)
    if not module.training:  # as in training: some modules give losses only there
        module.train()
    if run.settings["limit_train_batches"] is None:
        _try_batch_of_one(run, sizes)
    _try_evaluation_of_one(run, data[1])
    # With a mode of functions nothing is compiled.
    compiles = "torch._dynamo" in sys.modules
    with torch.compiler.set_stance("force_eager") if compiles else nullcontext(), LossesSaid():
        _try_one_batch(run, client, 0, lambda output: check_gradient(module, output))
    for _, client, row in labels:
        _try_one_batch(run, client, row)
    _try_validation(run, data[1])


def _refuse_picking(key: str, size: int, dataset: Any, collate_fn: Any) -> None:
    if size > 1 and dataset is not None and picks_one(dataset, collate_fn):
        what = f"gives one of the samples that it gets, so that {size - 1} of {size} are lost"
        raise MisconfigurationException(f"data: collate_fn {what}. Where each sample is a batch, set data.{key}: 1.")


def _check_client_data(run: RunContext) -> None:
    """Refuse, or say in a line, that nothing will be seen of what only an evaluation on clients' own data shows."""
    datamodule, personal = run.datamodule, run.settings["personal"]
    if personal is None and not datamodule.new_clients:
        return
    clients = range(datamodule.num_clients + len(datamodule.new_clients))
    keys = [k for k in ("client_val_every_n_rounds", "limit_val_batches") if run.settings[k] == 0]
    if keys or not overrides(run.module, "validation_step"):
        why = f"trainer.{keys[0]}=0" if keys else "the model has no validation_step"
    elif any(datamodule.client_val_dataset(client) for client in clients):
        return
    else:
        why = f"{type(given_data(datamodule)).__name__}.client_val_dataset gives no data of a client"
    if personal is not None and personal.adapts_all and personal.perturbation is None:
        what = f"trainer.personal: {type(personal).__name__} is for evaluation alone, and nothing comes of it"
        raise MisconfigurationException(f"{what}: {why}.")
    rank_zero_info(f"clients/personal_*, clients/new_*: no model is evaluated on a client's own data, as {why}.")


def _check_algorithm(federation: Federation, schedule: RoundSchedule) -> None:
    """Refuse the wrong optimizer; warn where an estimate that is divided by p_i makes steps of small clients long."""
    algorithm, name, found = federation.algorithm, type(federation.algorithm).__name__, schedule.optimizer
    if algorithm.optimizers and not isinstance(found, algorithm.optimizers):
        wanted = algorithm.optimizers[0]
        raise MisconfigurationException(
            f"algorithm: {name} has clients step with {wanted.__name__}, and model.configure_optimizers gives"
            f" {type(found).__name__}. Set model.optimizer to {wanted.__module__}.{wanted.__qualname__}."
        )
    if algorithm.needs_lr and not (schedule.has_lr and schedule.lr > 0):
        raise MisconfigurationException(
            f"algorithm: {name} divides by the local learning rate, and model.optimizer has none that is positive"
            f" (found {schedule.lr}). Use an optimizer with an lr, or another algorithm."
        )
    also = " and momentum" * any(group.get("momentum", 0) for group in found.param_groups)
    also += " and several learning rates" * (len({float(group.get("lr", 0)) for group in found.param_groups}) > 1)
    if algorithm.needs_lr and not algorithm.optimizers and (also or not isinstance(found, SGD)):
        rank_zero_info(
            f"algorithm: {name} takes a client's update, divided by its (first) learning rates, for its gradient. That"
            f" is so of plain SGD; with {type(found).__name__}{also} it has another size."
        )
    sizes = federation.sizes[federation.sizes > 0]
    smallest, largest = int(sizes.min()), int(sizes.max())
    if algorithm.needs_lr and algorithm.weighting == "samples" and largest > 10 * smallest:
        rank_zero_warn(
            f"algorithm: {name} divides the server's correction by p_i = n_i / mean(n), and clients have {smallest} to"
            f" {largest} samples: the steps of small ones may run away. Set algorithm.weighting to equal, or"
            " trainer.gradient_clip_val to 10, say."
        )


def _check_enough(trainer: Any, federation: Federation) -> None:
    """Refuse rounds with too few clients, or with more hostile ones than are tolerated; rounds are drawn ahead."""
    parts, sampler = (federation.algorithm, federation.aggregator), trainer.sampler
    if isinstance(sampler, WeightedBySamples) and federation.algorithm.mean_by == "samples":
        name = type(federation.algorithm).__name__
        rank_zero_info(
            f"trainer.sampler: WeightedBySamples draws clients by their samples, by which {name} weighs their models"
            " again; `algorithm: {class_path: FedOpt, init_args: {weighted: false}}` has the plain mean."
        )
    check_enough(sampler.clients_per_round, *parts, "trainer.clients_per_round gives {}")
    attacks, aggregator = attacks_by(trainer.settings["transforms"]), federation.aggregator
    if aggregator is None and not attacks:
        return
    rounds = range(trainer.current_round, trainer.max_rounds)
    drawn = [draw(sampler, round, trainer.seed) for round in rounds]
    present = {client for clients in drawn for client in clients}
    for attack in attacks:
        if drawn and attack.attackers.isdisjoint(present):
            none = f"of its {len(attack.attackers)} clients, none is drawn in {len(drawn)} rounds"
            rank_zero_warn(f"trainer.transforms: {type(attack).__name__} never attacks, as {none}.")
    if aggregator is None:
        return
    for clients in drawn:
        check_enough(len(clients), *parts, "trainer.sampler draws {} in some round")
    hostile = {client for attack in attacks for client in attack.attackers}
    more = [len(hostile.intersection(clients)) > aggregator.tolerates(len(clients)) for clients in drawn]
    own = [f"raise its `{key}`, " for key in ("attackers", "trim") if hasattr(aggregator, key)]
    text = (
        f"trainer.aggregator: {type(aggregator).__name__} tolerates {aggregator.tolerates(sampler.clients_per_round)}"
        f" attackers among {sampler.clients_per_round} clients, and {sum(more)} of {len(more)} rounds have more. To go"
        f" on, {''.join(own)}use another, or lower `clients` of the attack."
    )
    if 2 * sum(more) > len(more):
        raise MisconfigurationException(text)
    if any(more):
        rank_zero_warn(text)


def _try_one_batch(run: RunContext, client: int, start: int, look: Callable[[Any], None] | None = None) -> None:
    """One forward pass, so that shapes and labels that do not fit are found before training."""
    module, datamodule = run.module, run.datamodule
    first = max(0, min(start, datamodule.client_size(client) - datamodule.batch_size))
    batch = first_samples(datamodule, client, datamodule.batch_size, first)
    with _fitting(run, "training", f"a batch of {_shapes(batch)}, client {client}'s samples from {start} on"):
        loss = _attempt(run, batch, look)
        loss = loss.get("loss") if isinstance(loss, Mapping) else loss
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise MisconfigurationException(
                f"model: {type(module).__name__}.training_step must return a scalar loss or a dictionary with one under"
                f" 'loss'; it returned {type(loss).__name__}{' ' + _shapes(loss) if isinstance(loss, Tensor) else ''}."
            )


@contextmanager
def _fitting(run: RunContext, stage: str, data: str) -> Iterator[None]:
    """Refuse a step that fails on its data, unless it lacks what a callback may bring in a hook that is to come."""
    try:
        yield
    except _MISFITS as error:
        none = isinstance(error, KeyError) or "NoneType" in str(error)
        lacks = isinstance(error, AttributeError) and any(error.obj is part for part in run.module.modules())
        if (none or lacks) and strangers(run.trainer.callbacks):
            return
        step, text = f"{type(run.module).__name__}.{stage}_step", f"{type(error).__name__}: {error}"
        if run.settings["channels_last"] and "view size" in text:
            text += " For trainer.channels_last, view must be flatten or reshape."
        raise MisconfigurationException(f"model and data do not fit: {step} failed on {data}: {text}") from error


def _try_batch_of_one(run: RunContext, sizes: Tensor) -> None:
    """BatchNorm has no variance to divide by where a batch is one value per channel."""
    batch_size = run.datamodule.batch_size
    alone = (sizes % batch_size == 1 if batch_size > 1 else sizes > 0).nonzero().flatten()
    if len(alone) == 0 or not any(isinstance(m, _BatchNorm) and m.training for m in run.module.modules()):
        return
    client = int(alone[0])
    try:
        _attempt(run, first_samples(run.datamodule, client, 1))
    except Exception as error:
        if "more than 1 value per channel" not in str(error):
            return  # it comes again with a whole batch
        raise MisconfigurationException(
            f"model: BatchNorm cannot train on a batch of one sample ({error}). With data.batch_size={batch_size}"
            f" {len(alone)} clients have such a batch; client {client} has {int(sizes[client])} samples. Change"
            " data.batch_size, or use GroupNorm or LayerNorm."
        ) from error


def _try_validation(run: RunContext, val: Dataset[Any] | None) -> None:
    """One step of validation, which may come many rounds after the first: what Lightning's sanity check is for."""
    module, data = run.module, run.datamodule
    if not val or run.settings["limit_val_batches"] == 0 or not overrides(module, "validation_step"):
        return
    few = Subset(val, range(min(len(val), data.batch_size)))  # type: ignore[arg-type]
    stage, run.trainer.state.stage = run.trainer.state.stage, RunningStage.SANITY_CHECKING
    try:
        with _fitting(run, "validation", f"the first samples of {type(given_data(data)).__name__}.val_dataset"):
            prepared(module, lambda: run.evaluator.attempt(few, "validation"))
    finally:
        run.trainer.state.stage = stage


def _try_evaluation_of_one(run: RunContext, val: Any) -> None:
    """BatchNorm that keeps no statistics has none to divide by in evaluation either."""
    limit, lonely = run.settings["limit_val_batches"], [m for m in run.module.modules() if isinstance(m, _BatchNorm)]
    if limit is not None or all(m.track_running_stats for m in lonely) or not overrides(run.module, "validation_step"):
        return
    size, data = run.datamodule.eval_batch_size_on(run.fabric.device), run.datamodule
    sets = [val, *(data.client_val_dataset(client) for client in range(data.num_clients + len(data.new_clients)))]
    for dataset in (d for d in sets if d is not None and len(d) and (len(d) - 1) % size == 0):
        run.evaluator.attempt(Subset(dataset, [len(dataset) - 1]), "validation")
        return


def _attempt(run: RunContext, batch: Any, look: Callable[[Any], None] | None = None) -> Any:
    context = run.fabric.strategy.precision.forward_context()
    output = trial_step(run.module, run.evaluator.prepare(batch), context, look)
    if run.fabric.device.type == "cuda":  # where a label is found to be out of range later
        torch.cuda.synchronize()
    return output


def _shapes(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"{batch.dtype} {tuple(batch.shape)}".replace("torch.", "")
    if isinstance(batch, list | tuple):
        return "(" + ", ".join(_shapes(b) for b in batch) + ")"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{k}: {_shapes(v)}" for k, v in batch.items()) + "}"
    return type(batch).__name__

"""What an engine that records the local step once can not do, and what a step reads and does outside of its module."""

import logging
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torchmetrics import Metric

from fedlight.data.arrays import ArrayDataset
from fedlight.engines.base import Findings, LocalTraining
from fedlight.engines.optimizers import is_plain
from fedlight.module.hooks import BATCH_HOOKS, EPOCH_HOOKS, overrides
from fedlight.module.optimizers import configure_optimizers
from fedlight.module.state import _OUTSIDE, _PLAIN, _TORCH, ModuleState, _items, _package, _put_back
from fedlight.module.step import TRANSFER_HOOKS
from fedlight.penalties.numbers import scheduled
from fedlight.penalties.step import penalized_step

_LIBRARIES = "/torch/", "/lightning/", *(f"/fedlight/{room}/" for room in ("engines", "module", "penalties"))
_OURS = str(Path(__file__).parents[1])
_CLIENT_HOOKS = ("on_client_start", "on_client_end")


class Unrecordable(MisconfigurationException):
    """An engine cannot do the work, for a reason that ends without a full stop."""

    def __init__(self, engine: str, reason: str) -> None:
        instead = "trainer.compile=false" if "compile" in engine else "trainer.engine=eager"
        super().__init__(f"trainer.engine={engine}: {reason}. Use {instead}.")
        self.reason = reason


def check_recordable(training: LocalTraining, engine: str) -> None:
    """Refuse by name what would have to happen in Python in every step.

    Raises:
        Unrecordable: naming the hook, the dataset or the precision, and what to do instead.
    """
    for reason in _reasons(training, engine):
        raise Unrecordable(engine, reason)
    for name, layer in training.module.named_modules() if engine == "cuda_graph" else ():
        if isinstance(layer, nn.RNNBase) and layer.dropout and layer.num_layers > 1:
            shared = f"{name} draws its dropout in cuDNN, which has one state for all that a device trains"
            raise Unrecordable(engine, shared)


def _reasons(training: LocalTraining, engine: str) -> Iterator[str]:
    if training.optimizer_state:
        yield f"the algorithm has {', '.join(training.optimizer_state)} of the optimizer's state sent"
    if training.example is not None and training.example.objective.drift is not None:
        yield "the algorithm has clients drift beside their optimizer's steps"
    module = training.module
    own = getattr(training.call, "overridden", lambda hook: [type(module).__name__] * overrides(module, hook))
    for hook in (*BATCH_HOOKS, *EPOCH_HOOKS, *_CLIENT_HOOKS, *TRANSFER_HOOKS, "optimizer_step"):
        if owners := own(hook):
            yield f"{owners[0]} overrides {hook}, which has no place in a recorded local step"
    dataset = None if training.example is None else training.example.dataset
    if dataset is not None and not isinstance(dataset, ArrayDataset):
        yield (
            f"the clients' data is a {type(dataset).__name__}, read sample by sample; it takes tensors in memory (or"
            " what fits there: samples of tensors of one shape, without random numbers) and no data.collate_fn"
        )
    findings, step = training.findings, f"{type(module).__name__}.training_step"
    happens = [f"reads {read}, which a recorded step would freeze" for read in findings.read]
    happens += [f"draws from {name}, and a recorded step would freeze what it drew" for name in findings.drawn]
    happens += [f"{what}, and a recorded step would do so once" for what in findings.outside]
    yield from (f"{step} {what}" for what in happens)
    for name in findings.changed:
        if (metric := _metric_of(name, _metrics(module))) is not None:
            yield f"training_step updates the metric {metric!r}, which would mix the clients"
        yield f"{step} changes {name}, which a recorded step would freeze"
    optimizer = configure_optimizers(module).optimizer
    if engine in ("vmap", "cuda_graph") and not is_plain(optimizer):
        yield f"{type(optimizer).__name__} of configure_optimizers has hooks, a step or a state of its own"
    if findings.replaced and engine == "cuda_graph":
        yield f"{step} puts another tensor in the place of {findings.replaced[0]}; write into the buffer instead"
    found = findings if engine != "cuda_graph" or training.compile else Findings()
    yield from _at_parameters(module, found, optimizer)
    scaled = getattr(training.fabric.strategy.precision, "scaler", None) is not None
    if scaled and (engine != "cuda_graph" or training.compile):
        yield "trainer.precision=16-mixed looks for overflow in every step; bf16-mixed does not"


def _at_parameters(module: LightningModule, findings: Findings, optimizer: Optimizer) -> Iterator[str]:
    """What autograd does with a parameter by itself, and a copy, or a function that gives all gradients, does not."""
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            yield f"parameter {name} has a hook, which a recorded step would not call"
    if findings.written:
        yield f"training_step writes to parameter {findings.written[0]}, and a recorded step would lose that"
    groups = optimizer.param_groups
    if findings.idle and any(group.get(decay) for group in groups for decay in ("weight_decay", "lambd")):
        yield f"parameter {findings.idle[0]} has no gradient in a step, and weight decay would move it once recorded"
    if findings.waking and not (type(optimizer) is SGD and not any(group["momentum"] for group in groups)):
        yield f"parameter {findings.waking[0]} has a gradient in some steps only, and momentum would move it in others"
    for what in findings.unlike:
        how = "as it may where it looks at what a parameter is or at its .grad, or catches errors"
        yield f"training_step gives {what} where it is recorded as a function of tensors, {how}"


def explain(error: Exception, module: LightningModule, otherwise: str) -> str:
    """What the module did that led to an error as it was recorded, and where; ``otherwise`` if that is not known."""
    text, reason = str(error).strip(), otherwise
    if any(sign in text for sign in ("data-dependent", ".item()", "synchronizing CUDA", "stream is capturing")):
        reason = "branches on the value of a tensor, or takes it to Python"
    elif "randomness" in text:
        reason = (
            "draws random numbers into a tensor that is no client's own, as torch.normal and torch.distributions do;"
            " torch.randn and torch.randn_like draw for each client"
        )
    elif "expected scalar type" in text:
        reason = "has a layer that mixed precision has for one client alone, and trainer.precision=bf16-true for many"
    elif "in-place" in text or "inplace" in text:
        reason = "changes a tensor in place that the clients share"
    traced = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in traced if not any(place in frame.filename for place in _LIBRARIES)]
    where = f", at {frames[-1].filename}:{frames[-1].lineno}: `{frames[-1].line}`" if frames else ""
    first = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
    return f"training_step of {type(module).__name__} {reason} ({first}){where}"


def values_of_step(training: LocalTraining) -> tuple[ModuleState, list[Any]]:
    """What penalties and perturbation are set to, and variables that methods use, which a recorded step has frozen."""
    step = penalized_step(training.module)
    owners = {f"penalty {i}": vars(p) for i, p in enumerate([] if step is None else step.penalties)}
    owners |= {} if training.perturbation is None else {"perturbation": vars(training.perturbation)}
    state = ModuleState(owners, lambda: scheduled(owners))  # these are inputs: steps read what they are now
    return state, [variables(training.module, used=True), _hooks(training.module)]


def is_outdated(training: LocalTraining, values: tuple[ModuleState, list[Any]]) -> bool:
    """Whether what a recorded step has frozen has changed since it was last asked: then it must be recorded anew."""
    state, seen = values
    states = [state] if training.state is None else [state, training.state]
    metrics = _metrics(training.module)  # they count in validation, and no step may use them
    changes = [name for state in states if not state.unchanged() for name in state.changes()]
    for state in states:
        state.refresh()
    hooks = _hooks(training.module)
    others = differ(seen[0]) or hooks != seen[1]
    if others:
        seen[:] = variables(training.module, used=True), hooks
    return others or any(_metric_of(name, metrics) is None for name in changes)


def _hooks(module: LightningModule) -> list[Any]:
    kinds = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"
    return [hook for m in module.modules() for kind in kinds for hook in getattr(m, kind, {}).values()]


def _metrics(module: LightningModule) -> list[str]:
    return [name for name, m in module.named_modules() if isinstance(m, Metric)]


def _metric_of(name: str, metrics: list[str]) -> str | None:
    return next((metric for metric in metrics if name.startswith(f"self.{metric}.")), None)


@contextmanager
def seen_outside(module: nn.Module, found: set[str]) -> Iterator[None]:
    """Note in ``found`` what is printed, logged and changed of the variables that the module's methods see; undo it."""
    before, printed, handler = variables(module), StringIO(), logging.Handler(logging.INFO)
    # Our own lines, as that of MAN's layers, reach the root's handlers where a user has set these up.
    handler.emit = lambda record: None if record.pathname.startswith(_OURS) else found.add("logs")  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        with redirect_stdout(printed):
            yield
    finally:
        logging.getLogger().removeHandler(handler)
        if printed.getvalue():
            found.add("prints")
        for variable, (value, content) in before.items():
            if not _same(variable.get(), value):
                found.add(f"changes the variable {variable.name}")
                variable.put(value)
            if not _alike(content, _inside(value)):
                found.add(f"changes the variable {variable.name}")
                if not isinstance(value, Tensor):
                    _put_back(_container(value), content)


class _Variable:
    """A name in a scope, how it is read and set."""

    def __init__(self, name: str, get: Callable[[], Any], put: Callable[[Any], Any]) -> None:
        self.name, self.get, self.put = name, get, put


def variables(module: nn.Module, used: bool = False) -> dict[_Variable, tuple[Any, dict[Any, Any]]]:
    """The variables that the methods of the user's classes see (or use), each with its value and what is in it."""
    classes = {cls for part in module.modules() for cls in type(part).__mro__ if _package(cls) not in _TORCH | _OUTSIDE}
    methods = [f for cls in classes for f in vars(cls).values() if isinstance(f, FunctionType)]
    found, names_used = [], {name for f in methods for name in _names(f.__code__)} if used else None
    for scope in {id(f.__globals__): f.__globals__ for f in methods}.values():
        names = [n for n in scope if not n.startswith("__") and (names_used is None or n in names_used)]
        found += [_Variable(name, partial(scope.get, name), partial(scope.__setitem__, name)) for name in names]
    for f in methods:
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            found.append(_Variable(name, partial(_content, cell), partial(setattr, cell, "cell_contents")))
    held = {variable: variable.get() for variable in found}
    kinds = (*_PLAIN, Tensor)
    return {v: (x, _inside(x)) for v, x in held.items() if isinstance(x, kinds) or _container(x) is not None}


def differ(before: dict[_Variable, tuple[Any, dict[Any, Any]]]) -> bool:
    """Whether a variable has another value, or something else in it, than when :func:`variables` looked."""
    held = before.items()
    return any(not (_same(name.get(), value) and _alike(content, _inside(value))) for name, (value, content) in held)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _container(value: Any) -> Any:
    """What holds the parts of a value: itself, or its attributes; None where it has none that are looked at."""
    if isinstance(value, list | dict | set | deque):
        return value
    cls = type(value)
    own = _package(cls) not in _TORCH | _OUTSIDE and not isinstance(value, type | FunctionType | ModuleType | nn.Module)
    return vars(value) if own and hasattr(value, "__dict__") else None


def _same(now: Any, before: Any) -> bool:
    return now is before or (isinstance(before, _PLAIN) and type(now) is type(before) and bool(now == before))


def _inside(value: Any) -> dict[Any, Any]:
    """What is in a value; of a tensor, how often it was written to."""
    if isinstance(value, Tensor):
        return {} if value.is_inference() else {"writes": value._version}
    container = _container(value)
    return {} if container is None else dict(_items(container))


def _alike(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return len(one) == len(other) and all(k in other and _same(other[k], v) for k, v in one.items())


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is assigned yet
        return None

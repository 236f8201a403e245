"""A few local steps before training, on the module that trains: what they do besides changing its parameters."""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlight.data.arrays import ArrayDataset
from fedlight.engines.base import ClientTask, Findings, LocalTraining
from fedlight.engines.batch_order import StepSizes
from fedlight.engines.client_loop import ClientLoop
from fedlight.engines.recordable import seen_outside
from fedlight.local import LocalObjective
from fedlight.module.looking import watched
from fedlight.module.state import attributes_of, untouched
from fedlight.module.step import IndexedBatch
from fedlight.perturbations.base import State

if TYPE_CHECKING:
    from fedlight.engines.compiled import CompiledStep

STEPS = 3
"""Local steps of the trial: what happens in every second step is seen, too."""


_FAR = 1000
"""By so much other indices of batches are, with which the steps of an engine that records them must be the same."""


def try_steps(training: LocalTraining, call: Callable[..., Any], records: bool, functions: bool) -> Findings:
    """Train the example for a few steps, note what happens, and undo it; ``call`` calls the module's hooks.

    For an engine that ``records`` steps they are taken with other indices of the batches, too, and where it takes them
    as ``functions`` of tensors they are compared with what they give as such.

    Raises:
        MisconfigurationException: for what no engine can train, by name.
    """
    example = training.example
    assert example is not None
    findings, seen = _tried(training, example, call)
    if not records or findings.read or findings.drawn or findings.changed or findings.outside:
        return findings
    try:  # tensors and floats take an int's value unnoticed: `loss * batch_idx`, `0.9**batch_idx`
        apart = (_tried(training, example, call, _FAR)[1].params - seen.params).norm()
        rounding = 0.0 if apart.device.type == "cpu" else 0.01 * (seen.params - example.objective.start).norm()
        same = bool(apart <= rounding) or not bool(seen.params.isfinite().all())
    except Exception:  # as where a tensor has no such entry
        same = False
    if not same:
        return replace(findings, read=("batch_idx",))
    return _compared(training, example, call, findings) if functions else findings


def _compared(training: LocalTraining, example: ClientTask, call: Callable[..., Any], findings: Findings) -> Findings:
    """The findings, and those of one step on a full batch, on the next smaller one and on the smallest."""
    from fedlight.engines.compiled import CompiledStep  # torch.fx takes long to import
    from fedlight.engines.vmap.functions import ClientDropout

    if not isinstance(example.dataset, ArrayDataset):
        return findings
    training = replace(training, findings=findings)  # what moves is an input of the function
    every, own_loss = [findings], set[bool]()
    function, zero = CompiledStep(training, compile=False), torch.zeros((), dtype=torch.int64)
    for samples in StepSizes(training).tried:
        one = replace(example, dataset=example.dataset.first(samples), length=(None, 1))
        try:
            found, written = _tried(training, one, call, draws=ClientDropout(zero, zero))
            every.append(found)
            own_loss.add(written.own_loss)
            if found.moving != findings.moving or found.read or found.drawn or found.changed or found.outside:
                continue
            if written.draws:  # numbers may be drawn in another order
                continue
            what = written.differs(_tried(training, one, call, function=function)[1])
        except Exception:  # whoever takes such a step says what it is
            continue
        every.append(Findings(idle=found.idle, unlike=(f"{what} on {samples} samples",) if what else ()))
    if len(own_loss) > 1:
        every.append(Findings(idle=findings.idle, unlike=("a train/loss of its own in some steps only",)))
    joined = {f.name: [name for found in every for name in getattr(found, f.name)] for f in fields(Findings)}
    joined["waking"] = [name for name in joined["idle"] if not all(name in found.idle for found in every)]
    return Findings(**{key: tuple(dict.fromkeys(names)) for key, names in joined.items()})


@dataclass
class _Outcome:
    """What there is after the last of a trial's steps; what differs by more than ``rounding`` is not the same."""

    params: Tensor
    gradient: Tensor
    buffers: dict[str, Tensor]
    logs: dict[str, tuple[Tensor, Tensor]]
    own_loss: bool
    draws: bool
    rounding: float

    def differs(self, other: "_Outcome") -> str:
        """What is another with the other; empty if nothing is."""
        if self._apart(self.gradient, other.gradient, self.rounding, self.rounding * 0.01 * float(self.params.norm())):
            return "another gradient"
        if any(self._apart(value, other.buffers[name], 0.05) for name, value in self.buffers.items()):
            return "other buffers"
        logged = {name: weight.item() for name, (_, weight) in self.logs.items()}
        if logged != {name: weight.item() for name, (_, weight) in other.logs.items()}:
            return "other logs"
        both = ((*self.logs[name], other.logs[name][0]) for name in logged)  # a tie may give another sample's class
        return "other logs" if any(self._apart(a, b, 0.2, 1.0) for a, _, b in both) else ""

    def _apart(self, one: Tensor, other: Tensor, share: float, more: float = 0.0) -> bool:
        one, other = one.to(self.gradient.dtype), other.to(self.gradient.dtype)
        return bool(one.isfinite().all()) and not bool((one - other).norm() <= share * one.norm() + more)


def _tried(
    training: LocalTraining,
    example: ClientTask,
    call: Callable[..., Any],
    far: int = 0,
    function: "CompiledStep | None" = None,
    draws: AbstractContextManager[Any] | None = None,
) -> tuple[Findings, _Outcome]:
    """What steps do, and what comes of them; the indices of batches begin at ``far``."""
    module, changed, drawn = training.module, set[str](), set[str]()
    with untouched(module) as before:
        attributes, generators = attributes_of(module), dict[str, Any]()

        def watching(name: str, *args: Any) -> None:
            with watched(module, set()):  # hooks may read what they like; recorded steps have none
                call(name, *args)
            if name == "on_client_start":
                generators.update(_generators(training.fabric.device), state=_random_state(training.fabric.device))
            elif name == "on_train_batch_end":
                changed.update(attributes.changes())
                now = _generators(training.fabric.device)
                drawn.update(what for what in now if now[what] != generators[what])
                generators["draws"] = not torch.equal(_random_state(training.fabric.device), generators["state"])

        held = {name: tensor.data_ptr() for name, tensor in _held(module).items()}
        slot = _TrialLoop(replace(training, call=watching, epochs=None, steps=STEPS, num_workers=0), module, function)
        slot.read, slot.outside, slot.idle, slot.written, slot.far = set(), set(), set(), set(), far
        slot.draws = draws or nullcontext()
        try:
            result = slot.train(0, example)
            replaced = [name for name, tensor in _held(module).items() if held.get(name) != tensor.data_ptr()]
        finally:
            slot.flat.release()
        ids = {id(tensor) for tensor in before.moved()}
        frozen = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
        findings = Findings(
            moving=tuple(name for name, p in frozen if id(p) in ids),
            replaced=tuple(replaced),
            changed=tuple(sorted(changed - {f"self.{name}" for name in held})),
            drawn=tuple(sorted(drawn)),
            read=tuple(sorted(slot.read)),
            outside=tuple(sorted(slot.outside)),
            idle=tuple(name for name, p in module.named_parameters() if id(p) in slot.idle),
            written=tuple(sorted(slot.written)),
        )
        eps = 0.01 if "16" in training.fabric.strategy.precision.precision else torch.finfo(result.params.dtype).eps
        kept = slot.log.own_loss, generators["draws"], min(0.1, 2000 * eps)
        outcome = _Outcome(slot.flat.params, slot.flat.grad, result.buffers, result.metrics, *kept)
    return findings, outcome


def _held(module: nn.Module) -> dict[str, Tensor]:
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    return {**dict(module.named_buffers()), **frozen}


class _TrialLoop(ClientLoop):
    """Watches its steps, and the batch indices that it hands out."""

    read: set[str]
    outside: set[str]
    idle: set[int]
    written: set[str]
    far: int
    draws: AbstractContextManager[Any]

    def _gradient(self, batches: list[IndexedBatch], point: Tensor, nth: int) -> Tensor:
        before = self.flat.params.clone()
        gradient, views = super()._gradient(batches, point, nth), self.flat.layout.views
        both = zip(views(before).items(), views(self.flat.params).values(), strict=True)
        self.written.update(name for (name, old), now in both if not torch.equal(old, now))
        return gradient

    def _step(self, objective: LocalObjective, batches: list[IndexedBatch], state: State) -> tuple[State, bool]:
        indexed: list[IndexedBatch] = [(batch, WatchedIndex.of(i + self.far, self.read)) for batch, i in batches]
        with watched(self.module, self.read), seen_outside(self.module, self.outside), self.draws:
            found = super()._step(objective, indexed, state)
        self.idle.update(id(parameter) for parameter in self.flat.idle)
        return found


def _generators(device: torch.device) -> dict[str, Any]:
    """States of the host's global generators; on a CPU torch's own is left to layers such as dropout."""
    kind, keys, *rest = np.random.get_state()
    found: dict[str, Any] = {"random": random.getstate(), "numpy.random": (kind, np.asarray(keys).tobytes(), *rest)}
    found["torch, which it seeds"] = torch.initial_seed()
    return found if device.type == "cpu" else found | {"torch's CPU generator": torch.get_rng_state().tolist()}


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


class WatchedIndex(int):
    """A batch index that notes whether its value was asked for."""

    _read: set[str]

    @classmethod
    def of(cls, value: int, read: set[str]) -> "WatchedIndex":
        """A batch index that writes into ``read``."""
        index = cls(value)
        index._read = read
        return index


def _noting(name: str) -> Callable[..., Any]:
    original = getattr(int, name)

    def method(self: WatchedIndex, *args: Any) -> Any:
        self._read.add("batch_idx")
        return original(self, *args)

    return method


for _name in ("eq", "ne", "lt", "le", "gt", "ge", "bool", "mod", "floordiv", "truediv", "divmod", "index"):
    setattr(WatchedIndex, f"__{_name}__", _noting(f"__{_name}__"))
for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "float", "int", "hash", "str", "repr", "format", "and"):
    setattr(WatchedIndex, f"__{_name}__", _noting(f"__{_name}__"))

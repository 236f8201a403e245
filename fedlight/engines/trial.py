"""A few local steps before training, on the module that trains: what they do besides changing its parameters."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlight.engines.base import Findings, LocalTraining
from fedlight.engines.client_loop import ClientLoop
from fedlight.engines.recordable import seen_outside
from fedlight.local import LocalObjective
from fedlight.module.looking import watched
from fedlight.module.state import attributes_of, untouched
from fedlight.module.step import IndexedBatch
from fedlight.perturbations.base import State

STEPS = 3
"""Local steps of the trial: what happens in every second step is seen, too."""


_FAR = 1000
"""By so much other indices of batches are, with which the steps of an engine that records them must be the same."""


def try_steps(training: LocalTraining, call: Callable[..., Any], records: bool) -> Findings:
    """Train the example for a few steps, note what happens, and undo it; ``call`` calls the module's hooks.

    For an engine that ``records`` steps they are taken with other indices of the batches, too.

    Raises:
        MisconfigurationException: for what no engine can train, by name.
    """
    findings, params = _tried(training, call)
    if not records or findings.read or findings.drawn or findings.changed:
        return findings
    try:  # tensors and floats take an int's value unnoticed: `loss * batch_idx`, `0.9**batch_idx`
        apart = (_tried(training, call, _FAR)[1] - params).norm()
        assert training.example is not None
        rounding = 0.0 if params.device.type == "cpu" else 0.01 * (params - training.example.objective.start).norm()
        same = bool(apart <= rounding) or not bool(params.isfinite().all())
    except Exception:  # as where a tensor has no such entry
        same = False
    return findings if same else replace(findings, read=("batch_idx",))


def _tried(training: LocalTraining, call: Callable[..., Any], far: int = 0) -> tuple[Findings, Tensor]:
    """What steps do, and the parameters ``[P]`` after them; the indices of batches begin at ``far``."""
    module, changed, drawn = training.module, set[str](), set[str]()
    assert training.example is not None
    with untouched(module) as before:
        attributes, generators = attributes_of(module), {}

        def watching(name: str, *args: Any) -> None:
            with watched(module, set()):  # hooks may read what they like; recorded steps have none
                call(name, *args)
            if name == "on_client_start":
                generators.update(_generators(training.fabric.device))
            elif name == "on_train_batch_end":
                changed.update(attributes.changes())
                now = _generators(training.fabric.device)
                drawn.update(what for what in now if now[what] != generators[what])

        held = {name: tensor.data_ptr() for name, tensor in _held(module).items()}
        slot = _TrialLoop(replace(training, call=watching, epochs=None, steps=STEPS, num_workers=0), module, None)
        slot.read, slot.outside, slot.idle, slot.written, slot.far = set(), set(), set(), set(), far
        try:
            slot.train(0, training.example)
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
    return findings, slot.flat.params


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

    def _gradient(self, batches: list[IndexedBatch], point: Tensor, nth: int) -> Tensor:
        before = self.flat.params.clone()
        gradient, views = super()._gradient(batches, point, nth), self.flat.layout.views
        both = zip(views(before).items(), views(self.flat.params).values(), strict=True)
        self.written.update(name for (name, old), now in both if not torch.equal(old, now))
        return gradient

    def _step(self, objective: LocalObjective, batches: list[IndexedBatch], state: State) -> tuple[State, bool]:
        indexed: list[IndexedBatch] = [(batch, WatchedIndex.of(i + self.far, self.read)) for batch, i in batches]
        with watched(self.module, self.read), seen_outside(self.module, self.outside):
            found = super()._step(objective, indexed, state)
        self.idle.update(id(parameter) for parameter in self.flat.idle)
        return found


def _generators(device: torch.device) -> dict[str, Any]:
    """States of the host's global generators; on a CPU torch's own is left to layers such as dropout."""
    kind, keys, *rest = np.random.get_state()
    found = {"random": random.getstate(), "numpy.random": (kind, np.asarray(keys).tobytes(), *rest)}
    return found if device.type == "cpu" else found | {"torch's CPU generator": torch.get_rng_state().tolist()}


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

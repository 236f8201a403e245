"""The local step of one client as one compiled program."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_structure

from fedlight.engines.base import LocalTraining
from fedlight.engines.recordable import Unrecordable, check_recordable, explain, is_outdated, values_of_step
from fedlight.engines.vmap.programs import ClientStep, Program, numbered
from fedlight.local import LocalObjective
from fedlight.module.logs import LogCollector
from fedlight.module.parameters import ParameterLayout
from fedlight.module.step import IndexedBatch
from fedlight.perturbations.base import State

_ENGINE = "eager with trainer.compile=true"


class CompiledStep:
    """Gives the gradient of a step on full batches; those of other sizes are not worth the time of compiling.

    It is a function of tensors only, so that all slots of an engine share it. To be compared with, it does not
    ``compile``, takes batches of any size, and runs as ``vmap`` does, with masks of dropout from the seed 0.

    Raises:
        MisconfigurationException: if Python code has to run in every step.
    """

    def __init__(self, training: LocalTraining, compile: bool = True) -> None:
        if compile:
            check_recordable(training, _ENGINE)
        self._training, self._values, self._compile = training, values_of_step(training), compile
        self._step = ClientStep(training, ParameterLayout.of(training.module))
        self._sizes = (training.batch_size,) * training.accumulate_grad_batches
        self._programs: dict[tuple[Any, ...], Program] = {}

    def refresh(self) -> None:
        """Compile anew where what a step reads from Python has changed."""
        if is_outdated(self._training, self._values):
            self._programs.clear()

    def takes(self, batches: Sequence[IndexedBatch]) -> bool:
        """Whether it is made for batches of these sizes."""
        return not self._compile or _sizes(batches) == self._sizes

    def __call__(
        self,
        params: Tensor,
        buffers: State,
        log: LogCollector,
        objective: LocalObjective,
        batches: Sequence[IndexedBatch],
        state: State,
    ) -> tuple[Tensor, State]:
        """What :func:`~fedlight.local.local_gradient` gives; ``buffers`` and ``log`` are brought up to date."""
        parts = zip(*(tree_leaves(batch) for batch, _ in batches), strict=True)
        leaves = [same[0] if len(same) == 1 else torch.cat(same) for same in parts]
        self._step.spec = spec = tree_structure(batches[0][0])
        named = {"params": params, **numbered(leaves)}
        for name, part in objective.parts().items():
            named[name] = part if isinstance(part, Tensor) else params.new_full((), part)
        named |= {f"state/{name}": value for name, value in state.items()}
        named |= {f"buffers/{name}": value for name, value in buffers.items()}
        if not self._compile:
            named |= {name: params.new_zeros((), dtype=torch.int64) for name in ("seed", "step")}
        key = spec, *((name, value.shape, value.dtype) for name, value in named.items())
        if key not in self._programs:
            shared = None if self._compile else frozenset[str]()
            self._programs[key] = Program(self._step, _sizes(batches), tuple(named), shared, self._compile)
        program = self._programs[key]
        try:
            if self._compile:
                out = program(named)
            else:
                out = {name: rows[0] for name, rows in program({k: v[None] for k, v in named.items()}).items()}
        except Exception as error:
            raise Unrecordable(_ENGINE, explain(error, self._training.module, "cannot be compiled")) from error
        log.own_loss |= self._step.own_loss
        for name, value in out.items():
            kind, _, key_ = name.partition("/")
            if kind == "buffers":
                buffers[key_].copy_(value)
            elif kind == "value":
                log.merge(key_, value, out[f"weight/{key_}"], program.reductions[key_])
        return out["gradient"], state | {n.removeprefix("state/"): v for n, v in out.items() if n.startswith("state/")}


def _sizes(batches: Sequence[IndexedBatch]) -> tuple[int, ...]:
    return tuple(len(tree_leaves(batch)[0]) for batch, _ in batches)

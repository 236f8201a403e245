"""A torch optimizer that steps many clients at once: their parameters are rows of one matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import groupby
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn, optim

from fedlight.engines.hyperparameters import Values
from fedlight.engines.optimizers import ENTRYWISE
from fedlight.module.optimizers import configure_optimizers
from fedlight.module.parameters import ParameterLayout

ELEMENTWISE = (*ENTRYWISE, optim.Adagrad, optim.ASGD)
"""Optimizers whose step treats every entry alone, so that rows and columns of a matrix may be anything."""


@dataclass(frozen=True)
class Block:
    """Clients with the same hyperparameters in every step: consecutive rows."""

    begin: int
    end: int  # the row after the last
    values: Sequence[Values]  # of each step


class StackedOptimizer:
    """The module's own optimizer on rows of parameters ``[K, P]``.

    Rows are sorted by the number of steps, the longest first, so that those which still train are the first ones.

    Raises:
        MisconfigurationException: if the optimizer does not work entry by entry.
    """

    def __init__(self, module: LightningModule, layout: ParameterLayout) -> None:
        template = configure_optimizers(module).optimizer
        self._type: Any = type(template)
        if self._type not in ELEMENTWISE:
            names = ", ".join(cls.__name__ for cls in ELEMENTWISE)
            raise MisconfigurationException(
                f"trainer.engine=vmap cannot step {self._type.__name__} for many clients at once; it can {names}."
                " Use one of these, or trainer.engine=eager."
            )
        arguments = signature(self._type).parameters
        # How a step is computed is chosen anew: the fused kernels take no rows of a matrix.
        chosen = {"foreach", "fused", "capturable"}
        self._defaults = {k: v for k, v in template.defaults.items() if k in arguments and k not in chosen}
        names_of = {id(p): name for name, p in module.named_parameters()}
        group_of = {names_of[id(p)]: i for i, group in enumerate(template.param_groups) for p in group["params"]}
        self._runs = list[_Run]()
        for group, infos in groupby(layout.parameters, key=lambda info: group_of.get(info.name)):
            part = list(infos)
            if group is not None:  # others are trainable, but the optimizer does not know them
                self._runs.append(_Run(group, part[0].offset, part[-1].offset + part[-1].numel))

    def check(self, kind: type) -> None:
        """Refuse that the module has come to use an optimizer of another class."""
        if kind is not self._type:
            was, now = self._type.__name__, kind.__name__
            reason = f"configure_optimizers makes {now} where it made {was}, and steps are taken as {was}'s"
            raise MisconfigurationException(f"trainer.engine=vmap: {reason}. Use trainer.engine=eager.")

    def begin(self, params: Tensor, blocks: Sequence[Block]) -> None:
        """Start a round, with fresh state, on ``params`` ``[K, P]``; steps change it in place."""
        self._leaves: list[tuple[nn.Parameter, Block, _Run]] = []
        groups = []
        for block in blocks:
            for run in self._runs:
                leaf = nn.Parameter(params[block.begin : block.end, run.begin : run.end], requires_grad=False)
                self._leaves.append((leaf, block, run))
                groups.append({"params": [leaf], **block.values[0][run.group]})
        self._optimizer = self._type(groups, **self._defaults)
        self._last = [block.values[0] for _, block, _ in self._leaves]

    def step(self, step: int, gradient: Tensor) -> None:
        """Step number ``step`` of the first A rows; ``gradient`` ``[A, P]``."""
        for i, (leaf, block, run) in enumerate(self._leaves):
            rows = min(len(gradient), block.end) - block.begin
            leaf.grad = None
            if rows <= 0:
                continue
            if rows < len(leaf):
                self._shorten(leaf, rows)
            leaf.grad = gradient[block.begin : block.begin + rows, run.begin : run.end]
            values = block.values[step]
            if values is not self._last[i]:
                self._optimizer.param_groups[i].update(values[run.group])
                self._last[i] = values
        self._optimizer.step()

    def _shorten(self, leaf: nn.Parameter, rows: int) -> None:
        """The last clients of a block have finished."""
        state = self._optimizer.state[leaf]
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == leaf.shape:
                state[name] = value[:rows]
        leaf.data = leaf.data[:rows]


@dataclass(frozen=True)
class _Run:
    """Neighbouring columns that belong to one parameter group."""

    group: int
    begin: int
    end: int

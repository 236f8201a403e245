"""What of a run's module the federation holds, and what must leave no trace."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from fedlight.module.parameters import load_tensors
from fedlight.module.state import ModuleState
from fedlight.run.context import RunContext


class Movers:
    """What clients and evaluations change of a run's module besides its trained parameters."""

    def __init__(self, run: RunContext) -> None:
        self._run = run

    @cached_property
    def state(self) -> ModuleState:
        """All of the module but the content of what the federation holds: what is trained or moves, and buffers."""
        return ModuleState({"self": self._run.module}, self._held)

    def _held(self) -> list[Tensor]:
        run = self._run
        names = {info.name for info in run.layout.parameters} | run.federation.state.buffers.keys()
        return [*(p for name, p in run.module.named_parameters() if name in names), *run.module.buffers()]

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Whatever an evaluation in here changes in the module is undone on exit."""
        self.state.refresh()
        try:
            yield
        finally:
            self.state.restore()
            load_tensors(self._run.module, self._run.federation.state.buffers)

    def adopt(self, names: Iterable[str]) -> None:
        """Treat these parameters, which have not moved yet, as buffers."""
        federation = self._run.federation
        new = {n: self.unmoved(n).clone() for n in names if n not in federation.state.buffers}
        federation.clients.initial_buffers = {**federation.clients.initial_buffers, **new}
        federation.state.buffers = {**federation.state.buffers, **new}

    def unmoved(self, name: str) -> Tensor:
        """A parameter without a gradient as it is between two clients."""
        return self._run.module.get_parameter(name).detach()

    def join(self, late: list[str]) -> None:
        """Parameters without gradient that a client of the round was the first to move are buffers of all."""
        if late:
            rank_zero_info(
                f"model: from now on {', '.join(late)} change without a gradient, and are treated as buffers."
            )
            self.adopt(late)
            self.state.capture()

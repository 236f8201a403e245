"""What of a session's module the federation holds, and what must leave no trace."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from fedlight.module.parameters import ParameterLayout, load_tensors
from fedlight.module.state import ModuleState
from fedlight.run.checkpoint import check_state_dict
from fedlight.run.resume import restore_schedule
from fedlight.run.snapshot import restore_callbacks

if TYPE_CHECKING:
    from fedlight.run.session import Session


class Movers:
    """What clients and evaluations change of a session's module besides its trained parameters."""

    def __init__(self, session: "Session") -> None:
        self._session = session

    @cached_property
    def state(self) -> ModuleState:
        """All of the module but the content of what the federation holds: what is trained or moves, and buffers."""
        return ModuleState({"self": self._session.module}, self._held)

    def _held(self) -> list[Tensor]:
        session = self._session
        names = {info.name for info in session.layout.parameters} | session.federation.state.buffers.keys()
        return [*(p for name, p in session.module.named_parameters() if name in names), *session.module.buffers()]

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Whatever an evaluation in here changes in the module is undone on exit."""
        self.state.refresh()
        try:
            yield
        finally:
            self.state.restore()
            load_tensors(self._session.module, self._session.federation.state.buffers)

    def adopt(self, names: Iterable[str]) -> None:
        """Treat these parameters, which have not moved yet, as buffers."""
        federation = self._session.federation
        new = {n: self.unmoved(n).clone() for n in names if n not in federation.state.buffers}
        federation.clients.initial_buffers = {**federation.clients.initial_buffers, **new}
        federation.state.buffers = {**federation.state.buffers, **new}

    def unmoved(self, name: str) -> Tensor:
        """A parameter without a gradient as it is between two clients."""
        return self._session.module.get_parameter(name).detach()

    def join(self, late: list[str]) -> None:
        """Parameters without gradient that a client of the round was the first to move are buffers of all."""
        if late:
            rank_zero_info(
                f"model: from now on {', '.join(late)} change without a gradient, and are treated as buffers."
            )
            self.adopt(late)
            self.state.capture()


def begin_federation(session: "Session", checkpoint: dict[str, Any] | None) -> None:
    """Make the federation; of a checkpoint, with its values, and with the parameters that its run trained.

    In a fit the flags are put back then: what hooks before training freeze is compared when they have been called.
    """
    if checkpoint is None:
        session._make_federation(None)
        return
    module, saved = session.module, checkpoint["state_dict"]
    check_state_dict(session._path, saved, module.state_dict())
    parameters = dict(module.named_parameters())
    flags = {name for name, p in parameters.items() if p.requires_grad}
    trained = checkpoint["fedlight"].get("experiment", {}).get("model", {}).get("trained", flags)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
    load_tensors(module, {n: saved[n] for n in parameters if n in saved and n not in trained})
    session._make_federation(checkpoint)
    if session.command == "fit":
        restore_callbacks(session, checkpoint)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in flags)


def follow_freezing(session: "Session", checkpoint: dict[str, Any] | None) -> None:
    """Honour what hooks before training have frozen or unfrozen.

    Raises:
        MisconfigurationException: if the checkpoint's run trained other parameters.
    """
    if ParameterLayout.of(session.module) != session.layout:
        session._make_federation(checkpoint)
        if checkpoint is not None:
            restore_schedule(session, checkpoint)

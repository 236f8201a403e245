"""The reference engine: one client after the other."""

from collections.abc import Iterable, Iterator

from fedlight.engines.base import ClientTask, Engine, LocalTraining, named
from fedlight.engines.client_loop import ClientLoop
from fedlight.local import ClientResult
from fedlight.seeding import preserved_global_rng


class Eager(Engine):
    """Trains the clients in turn, on the module itself. It takes any module and any device.

    With ``trainer.compile`` the gradient of full batches is one compiled program.
    """

    def __init__(self) -> None:
        self._slot: ClientLoop | None = None

    def setup(self, training: LocalTraining) -> None:
        """Rebind the module's parameters to one flat vector."""
        self._training, self._compiled = training, None
        if training.compile:
            from fedlight.engines.compiled import CompiledStep  # torch.fx takes long to import

            self._compiled = CompiledStep(training)
        self._slot = ClientLoop(training, training.module, self._compiled)

    def train(self, round: int, tasks: Iterable[ClientTask]) -> Iterator[ClientResult]:
        """Train the clients in the order of the tasks."""
        assert self._slot is not None
        if self._compiled is not None:
            self._compiled.refresh()
        elif self._training.state is not None:
            self._training.state.refresh()
        with preserved_global_rng():
            for task in tasks:
                with named(round, task.client):
                    result = self._slot.train(round, task)
                yield result

    def teardown(self) -> None:
        """Give the module's parameters storage of their own."""
        if self._slot is not None:
            self._slot.flat.release()
            self._slot = None

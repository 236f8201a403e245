"""Models of the clients' own, which are trained beside the shared one."""

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fedlight.local import ClientResult, LocalObjective
from fedlight.personal.base import OwnTraining, Personalization
from fedlight.perturbations.base import State

_BUFFER = "buffer "


class SecondModel(Personalization):
    """Base of methods by which each client trains another model in its round, on the same data, and keeps it.

    That training has the module's loss and optimizer, the trainer's penalties and perturbation, and random draws of its
    own. It follows :meth:`follow`, and nothing that the algorithm adds. Nothing of it is sent. A client that has never
    trained has the shared model. Buffers go on from where the client's own model has them.

    Args:
        epochs: local epochs of that training.
        steps: its local steps, instead; by default it is as long as the shared one.
    """

    trains_apart = True

    def __init__(self, epochs: int | None = None, steps: int | None = None) -> None:
        for key, value in (("epochs", epochs), ("steps", steps)):
            if value is not None and (type(value) is not int or value < 1):
                raise MisconfigurationException(f"trainer.personal: {key}={value!r} must be a whole number from 1 on.")
        if epochs is not None and steps is not None:
            raise MisconfigurationException("trainer.personal: epochs and steps exclude each other; set one.")
        self.epochs, self.steps = epochs, steps
        self.length = None if epochs is None and steps is None else (epochs, steps)

    def follow(self, start: Tensor, own: State) -> LocalObjective:
        """What that training follows.

        Args:
            start: the model that was broadcast, ``[P]``.
            own: the client's state; from its first round on ``params`` is its own model, ``[P]``.
        """
        return LocalObjective(own.get("params", start))

    def before(self, start: Tensor, own: State) -> OwnTraining:
        """The other training of a client in a round; a new one does the same where it is evaluated."""
        return OwnTraining(self.follow(start, own), self.length)

    adapt = before

    def trained(self, own: State, result: ClientResult, start: Tensor) -> State:
        """The client's own model as it is now."""
        return {"params": result.params, **{_BUFFER + name: value for name, value in result.buffers.items()}}

    def held(self, own: State) -> State:
        """The buffers of the client's own model."""
        return {name.removeprefix(_BUFFER): value for name, value in own.items() if name.startswith(_BUFFER)}

    def model(self, model: Tensor, own: State) -> Tensor:
        """The client's own model, or the shared one before its first round."""
        return own.get("params", model)

    def adapted(self, start: Tensor, result: ClientResult) -> Tensor:
        """The model of a client that has trained for its first time."""
        return self.model(start, self.trained({}, result, start))

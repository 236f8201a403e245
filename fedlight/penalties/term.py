"""What a penalty measures, and what it makes of that."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class Term(ABC):
    """A function of what submodules put out in a step; :class:`~fedlight.Penalty` adds it to the loss.

    Attributes:
        sees_functions: whether activation functions (``F.relu``) are looked for in the first step; see :meth:`takes`.
        compares: other models that run on the same batch, by name.
        watch: what observes a step, if it is not ``Observation``.
    """

    sees_functions = False
    compares: tuple[str, ...] = ()
    watch: Any = None

    def observe(self, module: nn.Module) -> dict[str, nn.Module]:
        """The submodules whose outputs are measured, by the name that their measurement gets. None by default."""
        return {}

    def measure(self, output: Any) -> Tensor:
        """What to keep of one output of an observed submodule; called in its forward pass, under its autocast."""
        raise NotImplementedError(f"{type(self).__name__} observes submodules, so it must define measure(output)")

    def takes(self, name: str, doubt: str, function: bool) -> bool:
        """Whether to measure what was called in the first step, from that on.

        Args:
            name: of an observed submodule, or ``<module>.<function>`` (``net.relu`` for ``F.relu`` in ``net``).
            doubt: what speaks against its being a layer, or "".
            function: whether it is a function.
        """
        return not doubt

    @abstractmethod
    def penalty(self, module: nn.Module, measured: dict[str, Tensor]) -> Tensor:
        """The differentiable term (a scalar) that is added to the loss of this step.

        It is part of programs that are captured, batched and compiled: it must not look at the values of tensors.

        Args:
            module: the module that trains.
            measured: what :meth:`measure` returned in this step, in the order of the calls. A submodule that was
                called again has a second entry, ``<name>_2``, and so on.
        """

    def metrics(self, measured: dict[str, Tensor]) -> dict[str, Tensor]:
        """What to log of a step besides ``train/penalty``: scalars by metric name. Nothing by default."""
        return {}

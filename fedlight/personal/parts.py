"""PersonalParts."""

from dataclasses import replace
from typing import Any, Literal, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor

from fedlight.local import ClientResult, LocalObjective
from fedlight.module.parameters import ParameterLayout
from fedlight.personal.base import OwnTraining, Personalization
from fedlight.personal.matching import matching, tensor_names
from fedlight.perturbations.base import State

_KEY = "trainer.personal"
Training = Literal["together", "alternating", "frozen"]


class PersonalParts(Personalization):
    """Parts of the model that stay with each client, their buffers included; only what is left crosses.

    The model is w = (u, v_i): u is shared, v_i the client's own. With ``train: together`` a client trains both at once
    from (u, v_i). ``alternating`` first trains v_i for ``epochs`` with u as received, then u, with v_i frozen.
    ``frozen`` leaves v_i as the module was initialised, the same for all clients. In each case the algorithm, which
    sees u alone, makes the next u; what it adds to a client's gradient or objective concerns u only.

    Args:
        parts: names of modules or parameters (``net.fc3``), regular expressions for whole names (``.*norm.*``), or
            types of modules (``BatchNorm``, ``torch.nn.Linear``). ``head`` is the last module that has parameters, and
            ``body`` all others, where none is called so.
        train: how clients train their parts.
        epochs: local epochs of the parts where they alternate; those of the rest are the trainer's.

    Source: Arivazhagan et al., "Federated Learning with Personalization Layers", 2019 (FedPer: ``head``, ``together``);
    Collins et al., "Exploiting Shared Representations for Personalized Federated Learning", ICML 2021 (FedRep:
    ``head``, ``alternating``); Liang et al., "Think Locally, Act Globally", 2020 (LG-FedAvg: ``body``,
    ``together``); Oh et al., "FedBABU: Toward Enhanced Representation for Federated Image Classification", ICLR 2022
    (``head``, ``frozen``).
    """

    def __init__(self, parts: str | list[str] = "head", train: Training = "together", epochs: int = 1) -> None:
        self.parts: list[Any] = [parts] if isinstance(parts, str) else parts
        if not self.parts or not all(type(p) is str and p for p in self.parts):
            names = "names, such as 'head', 'net.fc3' or 'torch.nn.BatchNorm2d'"
            raise MisconfigurationException(f"{_KEY}: parts={parts!r} must be {names}.")
        if train not in get_args(Training):
            raise MisconfigurationException(f"{_KEY}: train={train!r} must be one of {list(get_args(Training))}.")
        if type(epochs) is not int or epochs < 1:
            raise MisconfigurationException(f"{_KEY}: epochs={epochs!r} must be a whole number of at least 1.")
        self.train, self.epochs, self.trains_apart = train, epochs, train == "alternating"

    def setup(self, module: LightningModule, layout: ParameterLayout) -> None:
        """Find the parts.

        Raises:
            MisconfigurationException: if they are nothing or everything, or tear apart what belongs together.
        """
        found, tensors = matching(module, self.parts, _KEY), tensor_names(module)
        self.entries = layout.mask(lambda info: info.name in found)
        if bool(self.entries.all()):
            raise MisconfigurationException(
                f"{_KEY}: {self.parts} takes all {len(layout.parameters)} trained parameters, and nothing is left to"
                f" share: {', '.join(info.name for info in layout.parameters[:12])}. Leave some out."
            )
        trained = {tensors[info.name] for info in layout.parameters}
        self.buffers = frozenset(name for name in found if tensors[name] not in trained)
        if not bool(self.entries.any()) and found.isdisjoint(name for name, _ in module.named_buffers()):
            raise MisconfigurationException(f"{_KEY}: {self.parts} takes nothing that is trained.")

    def part(self, own: State, initial: Tensor) -> Tensor:
        """v_i, which begins as the module was initialised."""
        return own.get("params", initial)

    def before(self, start: Tensor, own: State) -> OwnTraining:
        """Train v_i, with u frozen; the shared training goes on from there."""
        shared = ~self.entries.to(start.device)
        return OwnTraining(LocalObjective(start, frozen=shared), (self.epochs, None), continued=True)

    def adapt(self, start: Tensor, own: State) -> OwnTraining | None:
        """Train v_i of a client that has none, with u frozen."""
        before = self.before(start, own)
        return before if self.trains_apart else replace(before, length=None)

    def objective(self, objective: LocalObjective) -> LocalObjective:
        """With v_i frozen unless both are trained together."""
        if self.train == "together":
            return objective
        own = self.entries.to(objective.start.device)
        return replace(objective, frozen=own if objective.frozen is None else own | objective.frozen)

    def client_update(self, own: State, result: ClientResult, start: Tensor | None = None) -> State:
        """The new v_i, after either training."""
        keeps = self.train != "frozen" and bool(self.entries.any())
        return {"params": result.params[self.entries.to(result.params.device)]} if keeps else {}

    trained = client_update

    def phrase(self, layout: ParameterLayout) -> str:
        """How much of the model it is, and which tensors."""
        infos = layout.where(self.entries).parameters
        names = [info.name for info in infos] or sorted(self.buffers)
        some = f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        share = f"{int(self.entries.sum()):,} of {layout.numel:,} parameters"
        return f"{len(infos)} of {len(layout.parameters)} tensors, {share}: {some}; {self.train}"

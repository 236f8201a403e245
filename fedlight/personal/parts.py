"""PersonalParts, and which tensors of a module a name, a regular expression or a type of module means."""

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any, Literal, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from fedlight.local import ClientResult, LocalObjective
from fedlight.module.parameters import ParameterLayout
from fedlight.personal.base import OwnTraining, Personalization
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


_SHOWN = 24


def tensor_names(module: nn.Module) -> dict[str, int]:
    """All names of a module's parameters and buffers, tied ones included, and which tensor each is."""
    parameters, buffers = (f(remove_duplicate=False) for f in (module.named_parameters, module.named_buffers))
    return {name: id(tensor) for name, tensor in (*parameters, *buffers)}


def matching(module: nn.Module, patterns: Iterable[str], key: str) -> set[str]:
    """Names of the parameters and buffers of what the patterns mean, which were given under a ``key``.

    Of each pattern that is the first that there is: a module or tensor of that name; ``head``, the last module that has
    parameters, or ``body``, all others; modules and tensors whose whole name a regular expression matches; modules of a
    class of that name or import path, or that inherit from one.

    Raises:
        MisconfigurationException: if one means nothing, saying what there is, or they tear apart what is one tensor, or
            parameters and statistics of one layer.
    """
    found, tensors = set[str](), tensor_names(module)
    for pattern in patterns:
        if not (names := _meant(module, tensors, pattern)):
            there = [_plain(n) for n, m in module.named_modules() if n and any(True for _ in m.parameters())]
            there.sort(key=lambda name: not name.endswith(f".{pattern}"))
            raise MisconfigurationException(
                f"{key}: {pattern!r} means nothing in {type(module).__name__}: no module or parameter has such a name,"
                f" and no module is of such a class. There are {', '.join(there[:_SHOWN])}"
                f"{' ...' * (len(there) > _SHOWN)}. `fedlight configs personal` lists what has a name of its own."
            )
        found |= names
    own = {tensors[name] for name in found}
    if torn := sorted(name for name in tensors.keys() - found if tensors[name] in own):
        other = next(name for name in found if tensors[name] == tensors[torn[0]])
        why = "which the clients would share. Name both of them, or neither."
        raise MisconfigurationException(f"{key}: {patterns} takes {other}, and {torn[0]} is the same tensor, {why}")
    for norm in (n for n, m in module.named_modules() if getattr(m, "running_mean", None) is not None):
        direct = {t for t in tensors if t.rpartition(".")[0] == norm}
        if found & direct and direct - found:
            taken, left = (", ".join(sorted(names)) for names in (found & direct, direct - found))
            why = f"takes {taken} and leaves {left}, which belong together. Name {norm} itself."
            raise MisconfigurationException(f"{key}: {patterns} {why}")
    return found


def _meant(module: nn.Module, tensors: Iterable[str], pattern: str) -> set[str]:
    modules = dict(module.named_modules(remove_duplicate=False))
    plain = {n: _plain(n) for n in (*tensors, *modules) if n}
    found = {n for n in plain if plain[n] == pattern}
    if last := pattern in ("head", "body") and not found:
        found = {[n for n, m in modules.items() if any(p.requires_grad for p in m.parameters(recurse=False))][-1]}
    with suppress(re.error):
        found = found or {n for n in plain if re.fullmatch(pattern, plain[n])}
    found = found or {n for n, m in modules.items() if n and _is_a(m, pattern)}
    below = tuple(f"{n}." if n else "" for n in found)
    own = {t for t in tensors if t in found or (below and t.startswith(below))}
    return {*tensors} - own if last and pattern == "body" else own


def _is_a(module: nn.Module, name: str) -> bool:
    if "." not in name:
        return any(cls.__name__.removeprefix("_") == name for cls in type(module).__mro__ if cls is not nn.Module)
    with suppress(ImportError, AttributeError, ValueError):
        return isinstance(cls := resolve_name(name), type) and isinstance(module, cls)
    return False


def _plain(name: str) -> str:
    """A name without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")

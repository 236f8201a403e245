"""Which submodules of a network a penalty looks at, and which functions."""

import copy
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.modules import activation
from torchmetrics import Metric

# Their outputs are probabilities, logits or attention, not what a layer passes on after its non-linearity.
_OUTPUTS = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax)
_ACTIVATIONS = tuple(cls for name in activation.__all__ if not issubclass(cls := getattr(activation, name), _OUTPUTS))
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")

Selector = str | type[nn.Module]


def squashes(function: Callable[..., Any]) -> bool:
    """Whether values stay between -1 and 1, as those of gates do."""
    try:
        with torch.random.fork_rng(devices=()), torch.no_grad():
            return bool(function(torch.tensor([-1e3, 1e3], device="cpu")).abs().max() <= 1)
    except Exception:  # it takes something else
        return False


def _names() -> dict[str, str]:
    """The functions of torch's activation modules: every name that torch has for one, and the one that it has here."""
    found = {"special_expit": "sigmoid"}
    for cls in _ACTIVATIONS:
        for name in (*cls.forward.__code__.co_names, cls.__name__.lower()):
            if callable(function := getattr(nn.functional, name, getattr(torch, name, None))):
                found |= dict.fromkeys((name, f"{name}_", function.__name__), name)
    return found


NAMES = _names()
SQUASHING = {name for name in NAMES.values() if squashes(getattr(nn.functional, name, None) or getattr(torch, name))}


def is_activation(module: nn.Module) -> bool:
    """Whether a module is one of torch's activations, or of another library's: by its name, or by what it computes."""
    if isinstance(module, _ACTIVATIONS):
        return True
    if isinstance(module, Metric) or type(module).__module__.startswith("torch.nn.") or [*module.children()]:
        return False
    name = type(module).__name__.lower().removesuffix("activation")
    return name in {function.replace("_", "") for function in NAMES.values()} or _acts_on_entries(module)


def _acts_on_entries(module: nn.Module) -> bool:
    """Whether f(x)_i is a non-linear function of x_i alone, as a copy shows; parameters may be scalars."""
    if any(tensor.numel() > 1 for tensor in (*module.parameters(), *module.buffers())):
        return False
    x = torch.linspace(-8, 8, 64, device="cpu").view(2, 2, 4, 4)
    kept = torch.arange(64, device="cpu").view(x.shape) % 3 == 0
    try:
        with torch.random.fork_rng(devices=()), torch.no_grad():
            f = copy.deepcopy(module).cpu().float().eval()
            y, other = f(x.clone()), f(torch.where(kept, x, x.flip(0) + 1))
            bend = f(x + 3) - 2 * y + f(x - 3)
            alone = y.shape == x.shape and torch.allclose(other[kept], y[kept], atol=1e-6)
            return alone and bool(bend.abs().max() > 1e-3)
    except Exception:  # it takes something else
        return False


def find_layers(module: nn.Module, selectors: Sequence[Selector] | None) -> dict[str, nn.Module]:
    """The submodules that ``MAN(layers=...)`` stands for, by name, in the module's order; by default all activations.

    Raises:
        MisconfigurationException: if a selector can match nothing, no function either; it lists what there is.
    """
    named = list(named_submodules(module))
    if selectors is None:
        found = [(name, child) for name, child in named if is_activation(child)]
    else:
        names, wanted = dict(named), set[int]()
        for selector in selectors:
            exact = selector in names
            matching = {id(child) for name, child in named if _matches(selector, name, child, exact)}
            functions = (f"{name}.{function}".lstrip(".") for name in ("", *names) for function in NAMES.values())
            if not matching and not any(matches_function(selector, function) for function in functions):
                raise MisconfigurationException(nothing_found(f"`layers`: {selector!r} matches nothing", module))
            wanted |= matching
        found = [(name, child) for name, child in named if id(child) in wanted]
    # A submodule goes by the first of its names. What is inside of a wrapper has the wrapper's name, and comes later.
    first_name = {id(child): name for name, child in reversed(found)}
    return {name: child for name, child in found if first_name[id(child)] == name}


def check_selectors(selectors: Any, who: str) -> list[Selector] | None:
    """Selectors as a list, or an error that names ``layers``."""
    if selectors is None:
        return None
    if isinstance(selectors, str | type) or not isinstance(selectors, Sequence) or not selectors:
        raise TypeError(f"{who}: `layers` must be a list with at least one entry, or null; found {selectors!r}")
    for selector in selectors:
        if isinstance(selector, str):
            try:
                re.compile(selector)
            except re.error as error:
                raise ValueError(f"{who}: `layers` has {selector!r}, an invalid regular expression: {error}") from error
        elif not (isinstance(selector, type) and issubclass(selector, nn.Module)):
            raise TypeError(f"{who}: `layers` takes module classes, names and regular expressions; found {selector!r}")
    return list(selectors)


def named_submodules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Submodules under every name that they have, without what wrappers insert into names."""
    for name, child in module.named_modules(remove_duplicate=False):
        name = _WRAPPERS.sub("", name).lstrip(".")
        if child is not module and name and not isinstance(child, torch.jit.ScriptModule):  # which takes no hooks
            yield name, child


def _matches(selector: Selector, name: str, module: nn.Module, exact: bool) -> bool:
    if isinstance(selector, type):
        return isinstance(module, selector)
    if exact:
        return name == selector
    cls = _class(selector)
    return isinstance(module, cls) if cls is not None else re.fullmatch(selector, name) is not None


def _class(path: str) -> type[nn.Module] | None:
    """The class at an import path, or None. The class of an existing module is loaded: nothing is imported for it."""
    package, _, name = path.rpartition(".")
    cls = getattr(sys.modules.get(package or "torch.nn"), name, None)
    return cls if isinstance(cls, type) and issubclass(cls, nn.Module) else None


def matches_function(selector: Selector, name: str) -> bool:
    """Whether a selector stands for the function ``<module>.<function>``."""
    return isinstance(selector, str) and _class(selector) is None and re.fullmatch(selector, name) is not None


def nothing_found(problem: str, module: nn.Module) -> str:
    """An error that lists what there is."""
    seen = [f"{name} ({type(child).__name__})" for name, child in named_submodules(module)]
    return (
        f"{problem} in {type(module).__name__}. Its submodules are: {_shortened(seen, 30) or 'none'}. Name in `layers` "
        "those whose outputs are the activations, or functions (`net.relu` for torch.nn.functional.relu in `net`)."
    )


def line(who: str, layers: Sequence[str], left_out: Mapping[str, str]) -> str:
    """One line that says which layers are taken, and what looks like one and is not."""
    text = f"{who}: {len(layers)} layer{'s' * (len(layers) != 1)}: {_shortened(layers, 8)}."
    for why in dict.fromkeys(left_out.values()):
        text += f" Left out, {why}: {_shortened([name for name in left_out if left_out[name] == why], 8)}."
    return text


def _shortened(names: Sequence[str], shown: int) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")

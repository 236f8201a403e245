"""Layers: which parameters belong to each, and which of them stand in the way of second derivatives."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from fedlight.analysis.operators import Block, NoSecondDerivativeError
from fedlight.module.state import untouched

ROOT = "root"
"""The name of the module itself, where it owns parameters directly."""


def layer_blocks(module: nn.Module, layers: Sequence[str] | None = None) -> dict[str, Block]:
    """The submodules that own trainable parameters, and the positions of these among all trainable ones.

    A parameter that several layers share belongs to the first of them, so that the blocks are disjoint and complete.

    Args:
        module: the module.
        layers: names of the layers to take; None for all.

    Raises:
        ValueError: if a name is no layer.
    """
    positions = {id(p): i for i, p in enumerate(p for p in module.parameters() if p.requires_grad)}
    blocks: dict[str, Block] = {}
    for name, child in module.named_modules():
        own = [positions.pop(id(p)) for p in child.parameters(recurse=False) if id(p) in positions]
        if own:
            blocks[name or ROOT] = tuple(own)
    if layers is None:
        return blocks
    for name in (name for name in layers if name not in blocks):
        close = "".join(f" Did you mean '{other}'?" for other in difflib.get_close_matches(name, blocks, 1))
        known = f"{close} The layers are: {', '.join(blocks)}."
        raise ValueError(f"`layers` names '{name}', which is not a layer with trainable parameters.{known}")
    return {name: blocks[name] for name in layers}


def differentiable_once(loss: Tensor) -> list[str]:
    """Names of the autograd functions behind ``loss`` that are marked ``once_differentiable``.

    Autograd treats what their backward pass returns as a constant, so that the Hessian would be wrong without a word.
    """
    found = set()
    for node in nodes(loss):
        function = getattr(type(node), "_forward_cls", None)
        code = getattr(getattr(function, "backward", None), "__code__", None)
        if function is not None and getattr(code, "co_filename", "") == torch.autograd.function.__file__:
            found.add(function.__name__)
    return sorted(found)


def nodes(loss: Tensor) -> set[Any]:
    """The graph behind ``loss``."""
    seen, stack = set(), [loss.grad_fn]
    while stack:
        if (node := stack.pop()) is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    return seen


def explain(error: RuntimeError, module: nn.Module, run: Callable[[], Any]) -> NoSecondDerivativeError:
    """The error of automatic differentiation with the names of the layers that cause it, which ``run`` leads to."""
    calls, in_place = _recorded(module, run)
    failing = [name for name, (args, kwargs) in calls.items() if not _twice(module.get_submodule(name), args, kwargs)]
    deepest = [n for n in failing if not any(o != n and f"{o}.".startswith(f"{n}." * bool(n)) for o in failing)]
    leaves = [name for name in deepest if next(module.get_submodule(name).children(), None) is None]
    reason = str(error).splitlines()[0].split(" Hint:")[0].rstrip(". ")
    # A container may fail because of what one of its layers does to another.
    named = leaves or (deepest if not in_place and deepest != [""] else [])
    if named:
        where = f"layer {_listed(module, named)} has none"
        advice = "Replace it by one that PyTorch can differentiate twice, without in-place operations."
    elif in_place:
        where = f"layer {_listed(module, in_place)} changes its input in place"
        advice = "Set inplace=False."
    else:
        where = f"training_step or forward of {type(module).__name__} has none"
        advice = "Use operations that PyTorch can differentiate twice, and none in place."
    text = f"The Hessian needs second derivatives of the loss, but {where} ({reason}). {advice}"
    return NoSecondDerivativeError(text)


def _listed(module: nn.Module, names: list[str]) -> str:
    return ", ".join(f"'{name}' ({type(module.get_submodule(name)).__name__})" for name in names)


def _recorded(module: nn.Module, run: Callable[[], Any]) -> tuple[dict[str, Any], list[str]]:
    """What every submodule was first called with, and which of them changed it in place."""
    calls: dict[str, Any] = {}
    versions: dict[str, list[int]] = {}
    in_place: list[str] = []
    handles = []
    for name, child in module.named_modules():

        def before(m: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            calls.setdefault(name, tree_map_only(Tensor, lambda leaf: leaf.detach().clone(), (args, kwargs)))
            versions[name] = _versions(args)

        def after(m: nn.Module, args: Any, output: Any, name: str = name) -> None:
            leaf = next(m.children(), None) is None
            if leaf and _versions(args) != versions[name] and name not in in_place:
                in_place.append(name)

        handles += [child.register_forward_pre_hook(before, with_kwargs=True), child.register_forward_hook(after)]
    try:
        with torch.enable_grad():
            run()
    except RuntimeError:
        pass  # what was recorded until then is what there is to look at
    finally:
        for handle in handles:
            handle.remove()
    return calls, in_place


def _versions(value: Any) -> list[int]:
    return [leaf._version for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _twice(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a submodule alone can be differentiated twice, with respect to its inputs and parameters."""
    leaves: list[Tensor] = [p for p in module.parameters() if p.requires_grad]

    def fresh(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not leaf.is_floating_point():
            return leaf.clone()
        leaves.append(leaf.detach().clone().requires_grad_())
        return leaves[-1].clone()  # a leaf itself may not be changed in place

    try:
        with torch.enable_grad(), untouched(module):
            args, kwargs = tree_map(fresh, (args, kwargs))
            outputs = [o for o in tree_leaves(module(*args, **kwargs)) if isinstance(o, Tensor) and o.requires_grad]
            if not outputs or not leaves:
                return True
            scalar = sum((o.square().sum() for o in outputs), torch.zeros(()))
            if differentiable_once(scalar):
                return False
            first: Sequence[Tensor | None] = torch.autograd.grad(scalar, leaves, create_graph=True, allow_unused=True)
            second = [g.sum() for g in first if g is not None and g.requires_grad]
            if second:
                torch.autograd.grad(torch.stack(second).sum(), leaves, allow_unused=True)
    except (RuntimeError, TypeError):
        return False
    return True

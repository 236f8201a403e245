"""What a penalty sees of a module in a step: the outputs of submodules, and of the functions that these call."""

import copy
import re
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_info
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from fedlight.penalties.layers import NAMES, SQUASHING, is_activation, line, named_submodules, nothing_found, squashes
from fedlight.penalties.term import Term

_PRODUCTS = {"mul", "mul_", "multiply", "multiply_"}
_SHAPES = {"expand_as", "view_as", "reshape_as", "type_as"}
_LINKS = {"sigmoid", "logsigmoid", "softplus"}  # what losses and metrics apply to logits
GATE, LOSS = "as gates, which multiply something", "as parts of the loss"
WEIGHT = "as functions of a parameter alone"
_WRITES = re.compile(r"[a-z]\w*_|__i\w+__|__setitem__")  # names of functions that change something in place
Source = tuple[str, str]
"""What is a layer or none as one: a function in all modules of a class, or a submodule ("", its name)."""


@dataclass
class _Findings:
    """What the first step has shown: one for all copies of a module."""

    doubts: dict[Source, str] | None = None  # what speaks against each source's being a layer, or ""
    takes: dict[tuple[Source, str], bool] = field(default_factory=dict)  # by source and name
    copied: set[tuple[Source, str]] = field(default_factory=set)  # what is changed in place after it is measured
    over: bool = False  # whether the fit that it was attached for has ended
    for_a_fit: bool = False

    def __getstate__(self) -> dict[str, Any]:  # of a file; what is read from it is no part of that fit
        return vars(self) | {"over": self.over or self.for_a_fit}


class Observation(TorchFunctionMode):
    """Hooks on submodules, and a mode that sees every call of a function of torch, at some microseconds each.

    In the first step all submodules have hooks, to tell where a call comes from. After it the mode is on only if a
    function is measured, and only modules of classes that call activation functions keep the hooks.
    """

    def __init__(self, penalty: Term, observed: dict[str, nn.Module], module: nn.Module) -> None:
        super().__init__()
        self.penalty, self.names = penalty, list(observed)
        self.looking = self.choosing = penalty.sees_functions
        self.findings, self._settled = _Findings(), not self.looking
        self._doubts: dict[Source, str] = {}
        self._with_grad, self._recording, self._level = True, False, 0
        self._told = WarningCache()
        self.forget()
        self.modules = [weakref.ref(child) for child in module.modules()]
        labels = {child: label for label, child in observed.items()}
        names = {child: name for name, child in reversed([("", module), *named_submodules(module)])}
        everywhere = [child for child in module.modules() if child in names] if self.looking else []
        modules = dict.fromkeys([*everywhere, *labels])
        self.frames = [_Frame(self, names.get(child, ""), child, labels.get(child)) for child in modules]
        if self.frames:
            torch.compiler.reset()  # what was compiled before does not look whether hooks have come

    def start(self) -> None:
        """A step begins."""
        self.forget()
        self._with_grad, self._recording, self._level = torch.is_grad_enabled(), True, _level()
        self.choosing = self.penalty.sees_functions and self.findings.doubts is None
        if not (self.choosing or self._settled or torch.compiler.is_compiling()):
            self._settle()

    def stop(self, model: str | None) -> None:
        """A step of the model that trains, or of another one, has ended, maybe with an exception."""
        self._recording = False

    def forget(self) -> None:
        """Let go of the step's tensors."""
        self.measured: dict[str, Tensor] = {}
        self._called: dict[str, tuple[Source, str]] = {}  # source and name of each measurement
        self._outputs: dict[str, Tensor] = {}  # and in the first step what was measured
        self._squashed: list[tuple[Tensor, Source]] = []  # values in [-1, 1], or what is made of one of them alone
        self._stack: list[_Frame] = []
        self._weights: list[Tensor] = []  # in the first step, what is made of one parameter alone
        self._layers: set[Source] = set()  # and what puts out anything else
        self._late: set[Source] = set()  # functions of training_step that nothing learns after
        self._within: set[Source] = set()  # and those that something does

    def remove(self, over: bool) -> None:
        """Take the hooks away; with ``over`` copies stop as well, which keep theirs."""
        self.findings.over = over
        for frame in self.frames:
            frame.remove(all=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function. The mode is off meanwhile: what that calls in turn is not seen."""
        if self._late and any(isinstance(tensor, nn.Parameter) for tensor in tree_leaves((args, kwargs))):
            self.learn()
        name = getattr(func, "__name__", "")
        if self._outputs and (_WRITES.fullmatch(name) or (kwargs or {}).get("inplace")):
            self._copy_written(args)
        out = func(*args, **(kwargs or {}))
        given = _tensors((args, kwargs)) if self.choosing else []
        if len(given) == 1 and (isinstance(given[0], nn.Parameter) or any(given[0] is w for w in self._weights)):
            self._weights += _tensors(out)
        if name in NAMES:
            self._take_function(NAMES[name], out)
        elif self._squashed:
            self._follow(name, (args, kwargs), out)
        return out

    def _take_function(self, function: str, out: Any) -> None:
        top = self._stack[-1] if self._stack else None
        kind, path = ("training_step", "") if top is None else (top.kind, top.name)
        source, seen = (kind, function), self.findings.doubts
        if (top is not None and top.opaque) or not (self.choosing or seen is None or source in seen):
            return
        if top is None and self._with_grad and not torch.is_grad_enabled():
            return  # figures for the log
        if self.choosing and function in SQUASHING:
            self._squashed.append((out, source))
        if self.choosing and (top is not None or function in _LINKS) and not any(f.learns for f in self._stack):
            self._doubts[source] = LOSS
        elif self.choosing and top is None:
            self._late.add(source)
        self.take(f"{path}.{function}" if path else function, out, source)

    def _copy_written(self, args: Any) -> None:
        """Measure on a copy what is about to be changed in place, now and in all steps: autograd needs it as it was."""
        for key, output in self._outputs.items():
            if args and isinstance(args[0], Tensor) and _owner(args[0]) is _owner(output):
                self.findings.copied.add(self._called[key])
                self.measured[key] = self.penalty.measure(output.clone())

    def learn(self) -> None:
        """Something that learns comes after what has been called."""
        self._within |= self._late
        self._late = set()

    def _follow(self, name: str, given: Any, out: Any) -> None:
        """Find gates. Tensors are compared by ``is``, which a compiler can follow."""
        tensors, made = _tensors(given), _tensors(out)
        for source, tensor in {s: t for t, s in self._squashed if any(t is other for other in tensors)}.items():
            others = [t for t in tensors if t is not tensor]
            if name in _PRODUCTS and any(t.dim() for t in others):
                self._doubts[source] = GATE
            elif not others or name in _SHAPES:
                self._squashed += [(t, source) for t in made]

    def take(self, name: str, output: Any, source: Source) -> None:
        """Measure what a submodule or a function has put out, if that is wanted."""
        if not self.choosing and not self._wants(source, name):
            return
        if isinstance(output, Tensor) and not (output.is_floating_point() or output.is_complex()):
            return  # numbers of rows
        if self.choosing and not any(output is weight for weight in self._weights):
            self._layers.add(source)
        output = output.clone() if (source, name) in self.findings.copied else output
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            # Activation checkpointing repeats a forward pass during backward, and expects the same tensors to be saved.
            self.penalty.measure(output)
        elif self._recording and self._with_grad and not torch.is_grad_enabled():
            self._told.warn(
                f"{type(self.penalty).__name__} leaves out '{name}', which training_step runs under torch.no_grad(). "
                "That is right for a frozen network; with activation checkpointing, set `use_reentrant=False`."
            )
        elif self._recording and _level() > self._level:  # what is made there does not outlive it
            self._told.warn(f"{type(self.penalty).__name__} leaves out '{name}' inside of torch.func transforms.")
        elif self._recording:
            key, calls = name, 1
            while key in self.measured:
                calls += 1
                key = f"{name}_{calls}"
            with _unrepeated() if source[0] else nullcontext():
                self.measured[key] = self.penalty.measure(output)
            self._called[key] = (source, name)
            if self.choosing and isinstance(output, Tensor):
                self._outputs[key] = output

    def _wants(self, source: Source, name: str) -> bool:
        takes, doubts = self.findings.takes, self.findings.doubts
        if (source, name) not in takes:
            takes[source, name] = self.penalty.takes(name, (doubts or {}).get(source, ""), bool(source[0]))
        return takes[source, name]

    def term(self, module: nn.Module) -> Tensor:
        """The penalty of the step."""
        if self.choosing and self._with_grad:
            self._choose()
        if not self.measured and self.findings.doubts:
            return torch.zeros(())  # a later step that calls no layer
        if self.names and not self.measured:
            raise MisconfigurationException(
                f"{type(self.penalty).__name__} saw no output of {', '.join(self.names)}: training_step of "
                f"{type(module).__name__} did not call these submodules with gradients on. Observe others."
            )
        if self.penalty.sees_functions and not self.measured:
            raise MisconfigurationException(nothing_found(f"{type(self.penalty).__name__} found no activation", module))
        return self.penalty.penalty(module, self.measured)

    def _choose(self) -> None:
        """After the first step: what is measured from now on, and of it."""
        called, self._outputs, self._weights = self._called, {}, []
        self._doubts |= dict.fromkeys(self._late - self._within, LOSS)
        self._doubts |= dict.fromkeys({source for source, _ in called.values()} - self._layers, WEIGHT)
        doubts = {source: self._doubts.get(source, "") for source, _ in called.values()}
        takes = {
            (source, name): self.penalty.takes(name, doubts[source], bool(source[0]))
            for source, name in called.values()
        }
        self.measured = {key: value for key, value in self.measured.items() if takes[called[key]]}
        if self.measured and not torch.compiler.is_compiling():
            self.findings.doubts, self.findings.takes = doubts, takes
            self._settle()
            left_out = {name: doubts[source] for (source, name), taken in takes.items() if doubts[source] and not taken}
            rank_zero_info(line(type(self.penalty).__name__, list(self.measured), left_out))

    def _settle(self) -> None:
        self._settled, takes = True, self.findings.takes
        self.looking = any(taken for (source, _), taken in takes.items() if source[0])
        kinds = {source[0] for source, _ in takes}
        for frame in self.frames:
            if not (self.looking and (frame.opaque or frame.kind in kinds)):
                frame.remove(all=False)

    def __getstate__(self) -> dict[str, Any]:
        cleared: dict[str, Any] = {"measured": {}, "_called": {}, "_outputs": {}, "_squashed": [], "_stack": []}
        return self.__dict__ | cleared | {"_weights": [], "_recording": False, "modules": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Observation":
        memo |= {id(shared): shared for shared in (self.penalty, self.findings)}
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return clone


class _Frame:
    """A submodule's hooks, of which deep copies have their own: they put it on the stack, and measure its output."""

    def __init__(self, observation: Observation, name: str, module: nn.Module, label: str | None) -> None:
        self.observation, self.name, self.label = observation, name, label
        self.kind = f"{type(module).__module__}.{type(module).__qualname__}"
        self.learns = any(True for _ in module.parameters())
        activates = observation.looking and is_activation(module)
        self.opaque, self.squashes = activates or isinstance(module, Metric), activates and squashes(module)
        entering = [module.register_forward_pre_hook(self.enter)] if observation.looking else []
        self.handles = [*entering, module.register_forward_hook(self.leave)]

    def enter(self, module: nn.Module, args: Any) -> None:
        if self.observation._recording:
            self.observation._stack.append(self)
            if self.observation._late and self.learns:
                self.observation.learn()

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        observation, stack = self.observation, self.observation._stack
        if self in stack:  # below what an exception that somebody caught has left
            del stack[stack.index(self) :]
        if self.label is None:
            return
        if self.squashes and observation.choosing and observation._recording:
            observation._squashed.append((output, ("", self.label)))
        observation.take(self.label, output, ("", self.label))

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a part of the module are copied, too, and hold no other part's hooks.
        return self.__dict__ | {"handles": [handle for handle in self.handles if handle.hooks_dict_ref() is not None]}

    def remove(self, all: bool) -> None:
        """Remove the hooks, or all but the one that measures."""
        for handle in self.handles if all or self.label is None else self.handles[:-1]:
            handle.remove()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _owner(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def _unrepeated() -> AbstractContextManager[Any]:
    """Activation checkpointing must not wait for what is saved in here: nobody sees the functions that it repeats."""
    if torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _level() -> int:
    """How many transforms of ``torch.func`` are being run inside of one another."""
    return 0 if torch.compiler.is_compiling() else torch._C._functorch.maybe_current_level() or 0

"""The local step of many clients as one program: `local_gradient` under ``torch.func``, traced and compiled."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch import LightningModule
from torch import Tensor
from torch._ops import OpOverload
from torch.func import grad, vmap
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_unflatten

from fedlight.engines.base import LocalTraining
from fedlight.engines.batch_order import StepSizes
from fedlight.engines.hyperparameters import LocalHyperparameters
from fedlight.engines.vmap.functions import ClientDropout, clients_as_channels
from fedlight.engines.vmap.stacked_optimizers import StackedOptimizer
from fedlight.local import LocalObjective, local_gradient
from fedlight.module.logs import LogCollector, collecting_logs
from fedlight.module.parameters import ParameterLayout
from fedlight.module.step import OtherModels, Reach, step_loss
from fedlight.penalties.step import penalized_step
from fedlight.perturbations.base import State
from fedlight.seeding import preserved_global_rng

_PADDING = 2**17
"""So many entries of rows that nobody needs cost less than a program for fewer rows."""

_ENTRIES = 2**28
"""A matrix of clients' parameters has at most so many entries: 1 GB in float32."""

Logs = dict[str, tuple[Tensor, Tensor]]
"""What was logged, by name: sum or extremum, and weight."""

TRACE_AFTER = 50
"""A program that runs more often than this is traced: that takes as long as about so many runs save."""

BACKEND = "inductor"
"""What compiles traced programs."""


class ClientStep:
    """One client's local step as a pure function of named tensors.

    Inputs: ``params`` ``[P]``, ``batch/<i>`` (the batch's tensors), what there is of ``anchor``, ``proximal``,
    ``linear``, ``gradient_scale`` and ``references/<name>``, ``state/<name>`` of the perturbation, ``buffers/<name>``,
    and, where clients draw dropout's masks by themselves, ``seed`` and ``step``.
    Outputs: ``gradient`` ``[P]``, ``buffers/<name>``, those of ``state/`` that changed, and ``value/<name>``,
    ``weight/<name>`` of the logs.

    Attributes:
        spec: what a batch is made of; set before the first call.
        reductions: how what was logged is combined, by name; known after a call.
        changing: those of ``state/`` that steps change; known after a call, None before.
        own_loss: whether the module logs its loss itself, as far as is known.
    """

    def __init__(self, training: LocalTraining, layout: ParameterLayout) -> None:
        self._training, self._layout = training, layout
        self._module = training.module
        self._reach, self._show = Reach(training.module), OtherModels(training.module, layout, recorded=True)
        self._precision = training.fabric.strategy.precision
        self.spec: TreeSpec
        self.reductions: dict[str, str] = {}
        self.changing: set[str] | None = None
        self.own_loss = False
        self.channels_last = training.channels_last

    def __call__(self, sizes: tuple[int, ...], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The step on a batch that consists of micro-batches of these sizes."""
        log = LogCollector(named["params"].device)
        buffers, logs = _part(named, "buffers/"), Logs()
        leaves = [leaf.split(list(sizes)) for leaf in _part(named, "batch/").values()]  # type: ignore[no-untyped-call]
        batches = [tree_unflatten(list(parts), self.spec) for parts in zip(*leaves, strict=True)]

        def loss(params: State, held: State, nth: int) -> tuple[Tensor, tuple[State, Logs]]:
            inner = {f"module.{name}": value for name, value in params.items()}
            inner |= {f"module.{name}": value.clone() for name, value in held.items()}
            terms, seen = [], self._training.seen(batches, nth)
            for batch in seen:
                with self._precision.forward_context():
                    term = self._reach.call(inner, self._loss, objective.references, log, batch, nth)
                terms.append(term if len(seen) == 1 else term * (1 / len(seen)))
            after = {name: inner[f"module.{name}"] for name in held}
            # What was logged belongs to this transform: it can leave it only as its result, and must not stay behind.
            logged = log.sums()
            log.reset()
            return torch.stack(terms).sum(), (after, logged)

        def gradient(point: Tensor, nth: int) -> Tensor:
            nonlocal buffers, logs
            grads, aux = grad(loss, has_aux=True)(self._layout.views(point), buffers, nth)
            buffers, logs = aux if nth == 0 else (buffers, logs)
            return torch.cat([g.reshape(-1) for g in grads.values()])

        before = state = _part(named, "state/")
        objective = LocalObjective.of(named["params"], named)
        draws = ClientDropout(named["seed"], named["step"]) if "seed" in named else nullcontext()
        perturbation, clip = self._training.perturbation, self._training.clip
        with collecting_logs(self._module, log), draws:
            g, state = local_gradient(named["params"], gradient, objective, perturbation, state, clip)
        if (step := penalized_step(self._module)) is not None:
            step.forget()
        out = {f"state/{k}": v for k, v in state.items() if v is not before.get(k)}
        self.changing, self.own_loss = set(out), log.own_loss
        out |= {"gradient": g} | {f"buffers/{k}": v for k, v in buffers.items()}
        self.reductions = {name: log.reduction(name) for name in logs}
        out |= {f"value/{k}": value for k, (value, _) in logs.items()}
        return out | {f"weight/{k}": weight for k, (_, weight) in logs.items()}

    def _loss(self, module: LightningModule, models: State, log: LogCollector, batch: Any, nth: int) -> Tensor:
        self._show(models, log, batch, 0)
        loss = step_loss(module, log, batch, 0, nth == 0, self._training.is_last(nth))
        if loss is None:
            raise TypeError("training_step returned None; every step needs a loss")
        return loss.reshape(())


def numbered(leaves: Iterable[Tensor]) -> dict[str, Tensor]:
    """The tensors of a batch by the names that :class:`ClientStep` reads."""
    return {f"batch/{i}": leaf for i, leaf in enumerate(leaves)}


def _part(named: Mapping[str, Tensor], prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


class Program:
    """The local step of several clients at once, for one set of shapes.

    It begins as ``torch.func.vmap`` of the step. When it has been used often it is traced into a plain list of tensor
    operations, which give the same bits without Python's part of the work.

    Args:
        step: one client's step.
        sizes: its micro-batches.
        names: the inputs, in order.
        shared: those that have no leading dimension, as all clients share them; None for one client alone.
        compile: compile what is traced, at the first call; otherwise trace after some calls.
    """

    def __init__(
        self,
        step: ClientStep,
        sizes: tuple[int, ...],
        names: Sequence[str],
        shared: frozenset[str] | None,
        compile: bool,
    ) -> None:
        self._names, self._compile = tuple(names), compile
        self._outputs: tuple[str, ...] = ()
        self.reductions: dict[str, str] = {}
        self._uses = 0

        def one(*tensors: Tensor) -> tuple[Tensor, ...]:
            out = step(sizes, dict(zip(names, tensors, strict=True)))
            self._outputs, self.reductions = tuple(out), step.reductions
            return tuple(out.values())

        self._function: Callable[..., tuple[Tensor, ...]] = one
        if shared is not None:
            in_dims = tuple(None if name in shared else 0 for name in names)
            self._function = vmap(one, in_dims=in_dims, randomness="different")
            if step.channels_last:
                self._function = clients_as_channels(self._function)

    def __call__(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run it: inputs ``[A, ...]`` by name, outputs ``[A, ...]`` by name."""
        tensors = [named[name] for name in self._names]
        self._uses += 1
        if self._uses == (1 if self._compile else TRACE_AFTER):
            self._function = self._traced(tensors)
        with torch.no_grad():
            outputs = self._function(*tensors)
        return dict(zip(self._outputs, outputs, strict=True))

    def _traced(self, tensors: list[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        with preserved_global_rng():
            # Inputs that are one tensor now may be two later: tracing would take them for one.
            try:
                traced = simplified(make_fx(self._function)(*(tensor.detach() for tensor in tensors)))
            except Exception:
                if self._compile:
                    raise
                return self._function  # what torch cannot trace runs as it did, with the same bits
            if not self._compile:
                return traced.forward
            compiled = torch.compile(traced, dynamic=False, backend=BACKEND)
            try:
                compiled(*tensors)
            except Exception as error:
                what = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
                rank_zero_warn(f"trainer.compile: runs uncompiled, as compiling failed: {what}")
                return traced.forward
            return compiled


class StackedParts:
    """What all waves of an engine share.

    Attributes:
        optimizer: steps the rows.
        schedule: its hyperparameters.
        step: one client's step.
        at_once: clients of a wave, at most.
        alone: sizes of the micro-batches of steps that are run for one client at a time.
        programs: for (sizes of the micro-batches, clients, inputs, inputs that clients share).
    """

    def __init__(self, training: LocalTraining) -> None:
        layout = ParameterLayout.of(training.module)
        self.training, self.step = training, ClientStep(training, layout)
        self.optimizer = StackedOptimizer(training.module, layout)
        self.schedule = LocalHyperparameters(training.module, training.lr_factors)
        self.at_once, self._widths = max(1, _ENTRIES // layout.numel), max(1, _PADDING // layout.numel)
        self.alone = StepSizes(training).alone
        if training.compile:  # a compiled program has one size: further clients wait for the next wave
            self.at_once = min(self.at_once, training.clients)
        self.programs: dict[tuple[object, ...], Program] = {}

    def program(
        self, sizes: tuple[int, ...], clients: int, names: tuple[str, ...], shared: frozenset[str] | None
    ) -> Program:
        """The program for some clients with micro-batches of these sizes, and these inputs; see :class:`Program`."""
        key = (sizes, clients, names, shared)
        if key not in self.programs:
            self.programs[key] = Program(self.step, sizes, names, shared, self._compiles(sizes))
        return self.programs[key]

    def width(self, sizes: tuple[int, ...], clients: int) -> int:
        """For how many clients there is a program that takes so many.

        Compiled ones come for all clients, half of them, a quarter, and so on; others in multiples, where further rows
        cost little. There is none for one row then: a product of one matrix is not rounded as one of several.
        """
        if not self._compiles(sizes):
            most = max(clients, self.training.clients, min(self._widths, 2))
            return min(most, math.ceil(clients / self._widths) * self._widths)
        width = self.at_once
        while (width + 1) // 2 >= clients and width > 1:
            width = (width + 1) // 2
        return width

    def _compiles(self, sizes: tuple[int, ...]) -> bool:
        full = (self.training.batch_size,) * self.training.accumulate_grad_batches
        return self.training.compile and sizes == full


_MAY_DO_NOTHING = {
    torch.ops.aten.expand.default,
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.slice.Tensor,
}


def simplified(traced: GraphModule) -> GraphModule:
    """Leave out operations that do nothing and those that are there twice, a third of what vmap produces."""
    graph = traced.graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    pure = not any(node.target._schema.is_mutable for node in calls if isinstance(node.target, OpOverload))
    seen: dict[tuple[Any, str, str], Node] = {}
    for node in calls:
        if not isinstance(node.target, OpOverload):
            continue
        if node.target in _MAY_DO_NOTHING and _same_layout(node, node.args[0]):
            twin = node.args[0]
        elif pure and torch.Tag.nondeterministic_seeded not in node.target.tags:
            twin = seen.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        else:
            continue
        if twin is not node:
            node.replace_all_uses_with(twin)
            graph.erase_node(node)
    traced.recompile()
    return traced


def _same_layout(one: Node, other: Any) -> bool:
    a, b = one.meta.get("val"), other.meta.get("val")
    return a is not None and b is not None and a.shape == b.shape and a.stride() == b.stride()

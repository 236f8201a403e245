"""Clients that train side by side in the vmap engine: their rows, their batches, their steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import accumulate, groupby

import torch
from torch import Tensor

from fedlight.data.arrays import ArrayDataset
from fedlight.engines.base import ClientTask, LocalTraining
from fedlight.engines.batch_order import BatchOrder, batch_order, draws_of, same_storage
from fedlight.engines.hyperparameters import lr_sum
from fedlight.engines.vmap.programs import StackedParts, numbered
from fedlight.engines.vmap.stacked_optimizers import Block
from fedlight.local import ClientResult
from fedlight.module.optimizers import about

_GATHERED_BYTES = 2**27
"""Batches are read ahead, as many as fit into so many bytes."""

_NEUTRAL = {"min": float("inf"), "max": -float("inf")}
"""What changes no extremum."""

_CHANGED = ("state/", "buffers/")
"""How the names of what a step may change begin, besides the parameters."""

Tensors = list[Tensor]
"""The tensors of a batch, as inputs and targets."""


@dataclass
class _Group:
    """Clients whose step has micro-batches of the same sizes."""

    sizes: tuple[int, ...]
    rows: list[int] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)


class StackedClients:
    """The local training of some clients in one round.

    Rows are sorted by number of steps, the longest first: in every step the first rows are those that still train.
    """

    def __init__(self, round: int, tasks: Sequence[ClientTask], parts: StackedParts) -> None:
        self._parts, self._training, self._round = parts, parts.training, round
        plans = [batch_order(round, task, parts.training) for task in tasks]
        sizes = [len(task.dataset) if parts.schedule.asks else 0 for task in tasks]  # type: ignore[arg-type]
        both = zip(plans, tasks, sizes, strict=True)
        keys = [(-p.num_steps, (*p.steps_per_epoch, size), t.lrs or ()) for p, t, size in both]
        order = sorted(range(len(tasks)), key=lambda i: keys[i])
        self._rank = sorted(range(len(tasks)), key=lambda row: order[row])
        self._tasks, self._plans = [tasks[i] for i in order], [plans[i] for i in order]
        self._keys = [keys[i] for i in order]
        self._steps = [plan.steps(parts.training.accumulate_grad_batches) for plan in self._plans]
        self._data = _Data(round, self._tasks, self._plans, parts.training)
        parts.step.spec = self._data.datasets[0].storage.spec
        self._stack()
        self._logs: dict[str, list[tuple[slice | Tensor, Tensor, Tensor]]] = {}
        self._reductions: dict[str, str] = {}

    def run(self, steps: int | None = None) -> list[ClientResult]:
        """Train; ``steps`` stops early. Results come in the order of the tasks."""
        total, params = len(self._steps[0]), self._rows["params"]
        frozen = (self._rows | self._shared).get("frozen")
        start = None if frozen is None else params.clone()
        self._parts.optimizer.begin(params, self._blocks())
        numbers = torch.arange(total, device=params.device).unbind()
        for step, groups in self._read(total if steps is None else min(steps, total)):
            self._shared["step"] = numbers[step]
            gradient = self._gradient(groups)
            self._parts.optimizer.step(step, gradient)
            if frozen is not None and start is not None:
                torch.where(frozen, start, params, out=params)
        results = self._results()
        return [results[row] for row in self._rank]

    def _stack(self) -> None:
        """The clients' inputs: one row each, or one for all where it is the same tensor."""
        objectives = [task.objective for task in self._tasks]
        start, parts, named = objectives[0].start, [o.parts() for o in objectives], dict[str, list[Tensor]]()
        neutral: dict[str, Tensor | float] = {"anchor": start, "linear": torch.zeros_like(start)}
        neutral |= {"proximal": 0.0, "gradient_scale": 1.0, "frozen": torch.zeros_like(start, dtype=torch.bool)}
        for name in (name for name in {**neutral, **parts[0]} if any(name in part for part in parts)):
            given = [part[name] if name in part else neutral[name] for part in parts]
            named[name] = [v if isinstance(v, Tensor) else start.new_tensor(v) for v in given]
        for part in ("state", "buffers"):
            states = [task.perturbation if part == "state" else task.buffers for task in self._tasks]
            named |= {f"{part}/{name}": [state[name] for state in states] for name in states[0]}
        self._rows: dict[str, Tensor] = {"params": torch.stack([o.start for o in objectives])}
        seeds = [task.local_seed(self._training.seed, self._round) for task in self._tasks]
        self._rows["seed"] = torch.tensor(seeds, device=start.device)
        self._shared: dict[str, Tensor] = {}
        for name, values in named.items():
            changing = self._parts.step.changing
            changes = name.startswith("buffers/") or changing is None or name in changing
            if not changes and all(value is values[0] for value in values):
                self._shared[name] = values[0]
            else:
                self._rows[name] = torch.stack(values)

    def _blocks(self) -> list[Block]:
        """Rows with the same hyperparameters in every step."""
        schedule, begin, blocks = self._parts.schedule, 0, []
        for _, same in groupby(self._keys, key=lambda key: (key[1] if schedule.varies else (), key[2])):
            count = len(list(same))
            with about(self._training.module, self._tasks[begin].client):
                values = schedule.values(self._tasks[begin], self._plans[begin].steps_per_epoch)
            self._parts.optimizer.check(schedule.optimizer)
            blocks.append(Block(begin, begin + count, values))
            begin += count
        self._values = [block.values for block in blocks for _ in range(block.begin, block.end)]
        return blocks

    def _groups(self, step: int) -> list[_Group]:
        groups: dict[tuple[int, ...], _Group] = {}
        for row, steps in enumerate(self._steps):
            if step >= len(steps):
                break  # and so have all that follow
            begin, sizes = steps[step]
            group = groups.setdefault(sizes, _Group(sizes))
            group.rows.append(row)
            group.begins.append(begin)
        return list(groups.values())

    def _read(self, total: int) -> Iterator[tuple[int, list[tuple[_Group, Tensors]]]]:
        """Each step's groups with their batches, ``[A, n, ...]``."""
        ahead = self._data.samples_ahead
        step = 0
        while step < total:
            block: list[list[_Group]] = []
            samples = 0
            while step + len(block) < total and (not block or samples < ahead):
                block.append(self._groups(step + len(block)))
                samples += sum(sum(g.sizes) * len(g.rows) for g in block[-1])
            batches = self._data.read([group for groups in block for group in groups])
            for groups in block:
                yield step, [(group, next(batches)) for group in groups]
                step += 1

    def _gradient(self, groups: list[tuple[_Group, Tensors]]) -> Tensor:
        """Run a step's programs; the gradient ``[A, P]`` of the A clients that still train."""
        if len(groups) == 1:
            return self._run(*groups[0], slice(len(groups[0][0].rows)))
        params = self._rows["params"]
        gradient = params.new_empty(sum(len(group.rows) for group, _ in groups), params.shape[1])
        for group, batch in groups:
            rows = torch.tensor(group.rows, device=params.device)
            gradient[rows] = self._run(group, batch, rows)
        return gradient

    def _run(self, group: _Group, batch: Tensors, rows: slice | Tensor) -> Tensor:
        """Run a step of some rows, keep what it changed, and return their gradients."""
        if group.sizes in self._parts.alone:
            each = [self._run_one(group.sizes, [leaf[i] for leaf in batch], row) for i, row in enumerate(group.rows)]
            out = {name: torch.stack([one[name] for one in each]) for name in each[0]}
            return self._keep(out, len(group.rows), rows)
        count = len(group.rows)
        width = self._parts.width(group.sizes, count)
        source = rows
        if width > count:  # a compiled program has its size: the first client fills the places that are left
            padded = [*range(count), *[0] * (width - count)]
            source = torch.tensor([group.rows[i] for i in padded], device=batch[0].device)
            batch = [leaf[padded] for leaf in batch]
        named = {name: value[source] for name, value in self._rows.items()}
        named |= {**self._shared, **numbered(batch)}
        program = self._parts.program(group.sizes, width, tuple(named), frozenset(self._shared))
        out = program(named)
        self._reductions |= program.reductions
        return self._keep(out, count, rows)

    def _run_one(self, sizes: tuple[int, ...], batch: Tensors, row: int) -> dict[str, Tensor]:
        # Copies, whose addresses are alike: products may round by how far a matrix is from a multiple of 64 bytes.
        named = {name: value[row].clone() for name, value in self._rows.items()} | self._shared
        named |= numbered(leaf.clone() for leaf in batch)
        program = self._parts.program(sizes, 1, tuple(named), None)
        out = program(named)
        self._reductions |= program.reductions
        return out

    def _keep(self, out: dict[str, Tensor], count: int, rows: slice | Tensor) -> Tensor:
        """Keep what a program has changed of some rows; their gradients."""
        for name, value in out.items():
            kind, _, log = name.partition("/")
            if f"{kind}/" in _CHANGED:
                self._rows[name][rows] = value[:count]
            elif kind == "value":
                self._logs.setdefault(log, []).append((rows, value[:count], out[f"weight/{log}"][:count]))
        return out["gradient"][:count]

    def _results(self) -> list[ClientResult]:
        metrics = {name: self._reduce(name, entries) for name, entries in self._logs.items()}
        rows = {name: value.unbind() for name, value in self._rows.items() if name.startswith(("params", *_CHANGED))}
        kept = {name: value for name, value in self._shared.items() if name.startswith("state/")}
        results = []
        for row, (task, plan, values) in enumerate(zip(self._tasks, self._plans, self._values, strict=True)):
            # Copies: a row that is kept must not keep the whole matrix.
            own = kept | {name: value[row].clone() for name, value in rows.items()}
            results.append(
                ClientResult(
                    client=task.client,
                    start=task.objective.start,
                    params=own["params"],
                    num_samples=len(task.dataset),  # type: ignore[arg-type]
                    weight=task.weight,
                    num_steps=plan.num_steps,
                    lr_sum=lr_sum(values, plan.num_steps),
                    buffers={n.removeprefix("buffers/"): v for n, v in own.items() if n.startswith("buffers/")},
                    perturbation={n.removeprefix("state/"): v for n, v in own.items() if n.startswith("state/")},
                    metrics={name: (value[row], weight[row]) for name, (value, weight) in metrics.items()},
                    reductions={name: self._reductions[name] for name in metrics},
                )
            )
        return results

    def _reduce(self, name: str, entries: list[tuple[slice | Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What every client logged under a name: ``(Σ or extremum [K], Σ weight [K])``."""
        reduction = self._reductions[name]
        values = self._by_entry([(rows, value) for rows, value, _ in entries], _NEUTRAL.get(reduction, 0.0))
        weights = self._by_entry([(rows, weight) for rows, _, weight in entries], 0.0)
        # Sums go step by step: others would be rounded as the number of clients and of steps has it.
        total = values.cumsum(0)[-1] if reduction not in _NEUTRAL else getattr(values, f"a{reduction}")(0)
        return total, weights.cumsum(0)[-1]

    def _by_entry(self, entries: list[tuple[slice | Tensor, Tensor]], neutral: float) -> Tensor:
        """A row of all clients for each entry: ``[entries, K]``."""
        wide, clients = reduce(torch.promote_types, {value.dtype for _, value in entries}), len(self._tasks)
        if all(len(value) == clients for _, value in entries):
            return torch.stack([value.to(wide) for _, value in entries])
        out = entries[0][1].new_full((len(entries), clients), neutral, dtype=wide)
        for row, (rows, value) in zip(out, entries, strict=True):
            row[rows] = value.to(wide)
        return out


class _Data:
    """Reads the batches of several clients at once."""

    def __init__(
        self, round: int, tasks: Sequence[ClientTask], plans: Sequence[BatchOrder], training: LocalTraining
    ) -> None:
        device = training.fabric.device
        self._convert = training.fabric.strategy.precision.convert_input
        self.datasets = [task.dataset.near(device) for task in tasks if isinstance(task.dataset, ArrayDataset)]
        self._orders = [plan.order.to(device) for plan in plans]
        self._draws = [draws_of(round, task, plan, training) for task, plan in zip(tasks, plans, strict=True)]
        self._offsets = [0, *accumulate(len(order) for order in self._orders)]
        first = self.datasets[0]
        self._pooled = first.pooled() if all(same_storage(d, first) for d in self.datasets) else None
        if self._pooled is not None:
            both = zip(self.datasets, self._orders, strict=True)
            self._positions = torch.cat([dataset.positions(order) for dataset, order in both])
            self._all_draws = {name: torch.cat([own[name] for own in self._draws]) for name in self._draws[0]}
        each = sum(4 * leaf[:1].numel() for leaf in first.storage.leaves)
        self.samples_ahead = max(1, _GATHERED_BYTES // max(1, each))

    def read(self, groups: Sequence[_Group]) -> Iterator[Tensors]:
        """The batches ``[A, n, ...]`` of some groups; all those of one size are read together."""
        cells: dict[int, list[tuple[int, int]]] = {}
        for group in groups:
            cells.setdefault(sum(group.sizes), []).extend(zip(group.rows, group.begins, strict=True))
        read = {n: self._gather(pairs, n) for n, pairs in cells.items()}
        used = dict.fromkeys(cells, 0)
        for group in groups:
            n, count = sum(group.sizes), len(group.rows)
            yield [leaf[used[n] : used[n] + count] for leaf in read[n]]
            used[n] += count

    def _gather(self, pairs: Sequence[tuple[int, int]], n: int) -> Tensors:
        if self._pooled is None:
            parts = []
            for row, begin in pairs:
                draws = {name: value[begin : begin + n] for name, value in self._draws[row].items()}
                parts.append(self.datasets[row].leaves(self._orders[row][begin : begin + n], draws))
            leaves = [torch.cat(same) for same in zip(*parts, strict=True)]
        else:
            begins = torch.tensor([self._offsets[row] + begin for row, begin in pairs], device=self._positions.device)
            index = (begins[:, None] + torch.arange(n, device=begins.device)).flatten()
            draws = {name: value[index] for name, value in self._all_draws.items()}
            leaves = self._pooled.leaves(self._positions[index], draws)
        return [leaf.unflatten(0, (len(pairs), n)) for leaf in self._convert(leaves)]

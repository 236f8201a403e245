"""What comes in from the clients of a round: checked, added up as it comes, and let go of."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from fedlight.algorithms.base import Algorithm
from fedlight.perturbations.base import State
from fedlight.server.aggregators import Aggregator
from fedlight.server.rows import from_all
from fedlight.server.state import moved
from fedlight.server.sums import LIMIT, ExactSums, in_range, stack_terms

_AT_ONCE = 2**16
"""Entries that wait to be added together: small vectors cost a call each, large ones memory."""


@dataclass(frozen=True)
class Report:
    """What one client's training amounts to, in figures."""

    client: int
    used: bool  # whether its message was added; otherwise something in it was NaN, infinite or huge
    weight: float  # in the mean of the round
    square: Any  # ‖Δ_i‖²
    num_samples: int  # n_i
    num_steps: int  # local steps that it took
    steps_apart: int  # those of a training for itself, before
    up_bytes: int  # size of its message
    loss_scale: Any  # that 16-bit mixed precision ended with
    metrics: Mapping[str, tuple[Any, Any]]  # logged sums, as name -> (weighted sum, weight)
    reductions: Mapping[str, str]  # how each logged name is combined

    @property
    def values(self) -> dict[str, float]:
        """What the client logged, over its batches."""
        return _reduced([self])


@dataclass(frozen=True)
class Entry:
    """A client's message on its way into the sums."""

    report: Report
    terms: State  # what is added up
    maxima: State  # integers of which the server keeps the largest
    rows: dict[str, State]  # the client's state after the round, by part; kept only if the message is used
    kept: State | None  # what the server needs of each client by itself, if anything


@dataclass
class Incoming:
    """The sums of one round."""

    keep: Callable[[int, dict[str, State]], None]  # keeps a client's new state
    sums: ExactSums = field(default_factory=ExactSums)
    maxima: State = field(default_factory=dict)
    reports: list[Report] = field(default_factory=list)
    kept: dict[int, State] = field(default_factory=dict)  # of each client by itself
    _beyond: set[str] = field(default_factory=set)  # names of what could not be added
    _waiting: list[Entry] = field(default_factory=list)
    _entries: int = 0

    def add(self, entry: Entry) -> None:
        """Take a message in; with others of the same names, if it is small."""
        if self._waiting and self._waiting[0].terms.keys() != entry.terms.keys():
            self.flush()
        self._waiting.append(entry)
        self._entries += sum(term.numel() for term in entry.terms.values())
        if self._entries >= _AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Add what waits. What cannot be added leaves no trace but its report."""
        waiting, self._waiting, self._entries = self._waiting, [], 0
        if not waiting:
            return
        stacked = stack_terms([entry.terms for entry in waiting])
        good, bounds = in_range(stacked)
        if not all(good):
            self._beyond |= {name for name, values in stacked.items() if not bool((values.abs() < LIMIT).all())}
            stacked = {name: values[torch.tensor(good, device=values.device)] for name, values in stacked.items()}
        if any(good):
            self.sums.add(stacked, bounds)
        # As Python numbers: what is kept of each client must be small, and lie among other small things.
        self.reports += _as_numbers([entry.report for entry in waiting], good)
        for entry, used in zip(waiting, good, strict=True):
            if not used:
                continue
            self._raise(entry.maxima)
            self.keep(entry.report.client, entry.rows)
            if entry.kept is not None:
                self.kept[entry.report.client] = entry.kept

    def _raise(self, maxima: State) -> None:
        for name, value in maxima.items():
            self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value

    def name_left_out(self, round: int) -> None:
        """Warn of clients whose message cannot be used; a FloatingPointError if there is no other."""
        bad = [report.client for report in self.reports if not report.used]
        what, instead = "update", "Lower the learning rate, or set trainer.gradient_clip_val."
        if self._beyond and "update" not in self._beyond:  # `buffers/...`, say
            what, instead = min(self._beyond), "Let what is kept there begin and stay finite."
        if bad and len(bad) == len(self.reports):
            raise FloatingPointError(f"round {round}: the {what} of every client ({bad}) is NaN or infinite. {instead}")
        if bad:
            rank_zero_warn(f"round {round}: left out clients {bad}, whose {what} is NaN or infinite.")

    def finish(self, fabric: Fabric, stop: int = 0) -> int:
        """Complete the sums over all processes, in one reduction; the largest ``stop``.

        Reports and what was kept come in the order of the clients afterwards.
        """
        self.flush()
        if fabric.world_size > 1:
            shapes = {name: part.shape for name, part in self.sums.parts.items()}
            kept = {client: moved(state, "cpu") for client, state in self.kept.items()}
            own = (self.reports, shapes, self.sums.terms, moved(self.maxima, "cpu"), kept, stop)
            everyone = from_all(own, fabric.world_size)
            self.reports = [report for reports, *_ in everyone for report in reports]
            self.sums.count(sum(terms for _, _, terms, *_ in everyone))
            self.kept = {c: moved(s, fabric.device) for *_, states, _ in everyone for c, s in states.items()}
            self._reduce({name: shape for _, shapes, *_ in everyone for name, shape in shapes.items()}, fabric)
            for _, _, _, maxima, *_ in everyone:
                self._raise(moved(maxima, fabric.device))
            stop = max(s for *_, s in everyone)
        self.reports.sort(key=lambda report: report.client)
        self.kept = dict(sorted(self.kept.items()))
        return stop

    def _reduce(self, shapes: dict[str, torch.Size], fabric: Fabric) -> None:
        names, device = sorted(shapes), fabric.device
        mine = [self.sums.parts.get(n, torch.zeros(shapes[n], dtype=torch.float64, device=device)) for n in names]
        if not names:
            return
        together = torch.cat([part.reshape(-1) for part in mine])
        torch.distributed.all_reduce(together)
        parts = torch.split(together, [part.numel() for part in mine])
        self.sums.parts = {n: part.view(shapes[n]) for n, part in zip(names, parts, strict=True)}


def _as_numbers(reports: Sequence[Report], used: Sequence[bool]) -> list[Report]:
    """Reports whose figures are Python numbers, brought from the device together, and which say what was used."""
    scales = [() if r.loss_scale is None else (r.loss_scale,) for r in reports]
    pairs = [(x for pair in r.metrics.values() for x in pair) for r in reports]
    values = [v for r, scale, own in zip(reports, scales, pairs, strict=True) for v in (r.square, *scale, *own)]
    if any(isinstance(value, Tensor) and value.device.type != "cpu" for value in values):
        values = torch.stack([torch.as_tensor(value).double().reshape(()) for value in values]).tolist()
    numbers = map(float, values)

    def of(report: Report, used: bool) -> Report:
        square, scale = next(numbers), None if report.loss_scale is None else next(numbers)
        both = {name: (next(numbers), next(numbers)) for name in report.metrics}
        # What only others logged that trained beside it is no sum or extremum of anything.
        metrics = {name: pair for name, pair in both.items() if pair[1] or abs(pair[0]) not in (0.0, math.inf)}
        return replace(report, used=used, square=square, loss_scale=scale, metrics=metrics)

    return [of(*each) for each in zip(reports, used, strict=True)]


def round_metrics(reports: Sequence[Report], mean_update: Tensor | None) -> dict[str, Tensor | float]:
    """What the clients logged, reduced over them by samples seen, how many trained, and their drift.

    ``clients/drift`` is how far the clients' models lie from their mean, as a root mean square over the clients:
    sqrt(mean‖Δ_i‖² − ‖mean Δ‖²), with the weights of the algorithm's own mean. Where this mean ``[P]`` float64 is not
    known (None), neither is the drift.
    """
    used = [report for report in reports if report.used]
    figures = {"clients/trained": float(len(used)), "clients/left_out": float(len(reports) - len(used))}
    if mean_update is not None:
        total = math.fsum(report.weight for report in used)
        square = math.fsum(report.weight * report.square for report in used) / total
        rest = 0.0 if len(used) == 1 else square - float(mean_update.square().sum())
        figures["clients/drift"] = math.sqrt(max(0.0, rest))
    return {**_reduced(used), **figures}


def round_costs(reports: Sequence[Report], down_bytes: int, passes: int) -> dict[str, float]:
    """What a round has cost: megabytes, of which each client received ``down_bytes``, and gradients, so many a step."""
    return {
        "comm/down_mb": len(reports) * down_bytes / 1e6,
        "comm/up_mb": sum(report.up_bytes for report in reports) / 1e6,
        "clients/gradients": passes * sum(report.num_steps + report.steps_apart for report in reports),
    }


def check_enough(clients: int, algorithm: Algorithm, aggregator: Aggregator | None, found: str) -> None:
    """Refuse a round with fewer clients than algorithm or aggregator need."""
    for key, part in (("algorithm", algorithm), ("trainer.aggregator", aggregator)):
        if part is not None and clients < part.min_clients:
            raise MisconfigurationException(
                f"{key}: {type(part).__name__} needs {part.min_clients} clients in a round, and"
                f" {found.format(clients)}. Raise trainer.clients_per_round, or use another {key.split('.')[-1]}."
            )


def _reduced(reports: Sequence[Report]) -> dict[str, float]:
    logged: dict[str, list[tuple[float, float]]] = {}
    reductions: dict[str, str] = {}
    for report in reports:
        reductions |= report.reductions
        for name, sums in report.metrics.items():
            logged.setdefault(name, []).append(sums)
    out: dict[str, float] = {}
    for name, entries in logged.items():
        values, weights = [v for v, _ in entries], [w for _, w in entries]
        reduction = reductions.get(name, "mean")
        if reduction in ("min", "max"):
            out[name] = min(values) if reduction == "min" else max(values)
        else:
            total, seen = _sum(values), _sum(weights)
            out[name] = total if reduction == "sum" else total / seen if seen else math.nan
    return out


def _sum(values: Sequence[float]) -> float:
    """The exact sum, rounded once; what a module may log that has none, as in floating point."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return sum(values)

"""Sums of tensors that are exact, and so do not depend on the order in which their terms come."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

LIMIT = 2.0**36
"""Entries must be smaller than this in size."""
MAX_TERMS = 2**17
"""Sums are exact for so many terms at most."""
_UNITS = (1.0, 2.0**-37, 2.0**-74)
_BLOCK = 2**17
_SHIFTS = tuple(1.5 * 2.0**52 * unit for unit in _UNITS)


class ExactSums:
    """Named sums of tensors, the same bits for any order of the terms and any grouping of them into parts.

    A float64 number v is split into multiples of three fixed units u, the largest first: where C = 1.5·2^52·u, floating
    point numbers near C are u apart, so that (v + C) − C is v rounded to a multiple of u, exactly. Sums of multiples
    of u below 2^53·u are exact, and exact sums have no order. What is left of v after the last unit, at most 2^-75
    (3·10^-23), is dropped from each term by itself. All this holds for at most 2^17 terms with entries below 2^36:
    :func:`in_range` tells before a term is added.

    Memory is three float64 vectors for a name, whatever the number of terms.

    Source: the splitting is that of Rump, Ogita and Oishi, "Accurate Floating-Point Summation", SIAM J. Sci. Comput.
    2008; sums that do not depend on order are made of it by Demmel and Nguyen, "Fast Reproducible Floating-Point
    Summation", ARITH 2013.
    """

    def __init__(self) -> None:
        self.terms = 0
        self.parts: dict[str, Tensor] = {}

    def add(self, stacked: Mapping[str, Tensor], bounds: Mapping[str, float] | None = None) -> None:
        """Add terms to each name: ``[k, ...]`` float64 for k terms, in range.

        No entry of a name exceeds its bound: what is known to have no multiples of a unit need not be looked at.

        Raises:
            ValueError: if a name has another shape than before.
            OverflowError: if there are more terms than sums are exact for.
        """
        self.count(self.terms + max((len(values) for values in stacked.values()), default=0))
        for name, values in stacked.items():
            parts = self.parts.get(name)
            if parts is None:
                parts = self.parts[name] = values.new_zeros(len(_UNITS), *values.shape[1:])
            elif parts.shape[1:] != values.shape[1:]:
                raise ValueError(f"the terms of {name!r} are {list(parts.shape[1:])} and {list(values.shape[1:])}")
            known = (bounds or {}).get(name, math.inf)
            _add(values.flatten(1) if values.ndim > 1 else values[:, None], parts.view(len(_UNITS), -1), known)

    def count(self, terms: int) -> None:
        """Note how many terms there are; an OverflowError if sums of so many are not exact."""
        if terms > MAX_TERMS:
            raise OverflowError(f"trainer.clients_per_round: sums are exact for {MAX_TERMS} clients at most")
        self.terms = terms

    def totals(self) -> dict[str, Tensor]:
        """The sums in float64, by name."""
        return {name: (parts[2] + parts[1]).add_(parts[0]) for name, parts in self.parts.items()}


def _add(values: Tensor, parts: Tensor, bound: float) -> None:
    """Split ``[k, n]`` and add it to the parts ``[3, n]``, in blocks that stay in a processor's cache."""
    n, first = values.shape[1], sum(bound <= unit / 2 for unit in _UNITS)
    size = max(1, _BLOCK // len(values)) if values.device.type == "cpu" else max(1, n)
    multiples, rests = torch.empty_like(values[:, :size]), torch.empty_like(values[:, :size])
    for begin in range(0, n, size):
        rest, width = values[:, begin : begin + size], min(size, n - begin)
        multiple, scratch = multiples[:, :width], rests[:, :width]
        for unit, shift in enumerate(_SHIFTS[first:], first):
            torch.add(rest, shift, out=multiple).sub_(shift)
            parts[unit, begin : begin + size].add_(multiple[0] if len(multiple) == 1 else multiple.sum(0))
            if unit < len(_UNITS) - 1:
                rest = torch.sub(rest, multiple, out=scratch)


def stack_terms(terms: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Terms with the same names as float64 tensors ``[k, ...]``."""
    if len(terms) == 1:  # a large one is not copied
        return {name: term.detach().double()[None] for name, term in terms[0].items()}
    return {name: torch.stack([term[name].detach().double() for term in terms]) for name in terms[0]}


def in_range(stacked: Mapping[str, Tensor]) -> tuple[list[bool], dict[str, float]]:
    """For each of k stacked terms whether all its entries are finite, and small enough to be summed exactly.

    Also, by name, what no entry is larger than.
    """
    filled = {name: v.reshape(len(v), -1) for name, v in stacked.items() if v.numel()}
    ends = torch.stack([torch.maximum(v.amax(1), -v.amin(1)) for v in filled.values()])
    sizes = ends.nan_to_num(nan=math.inf).tolist()
    bounds = {name: max(each) for name, each in zip(filled, sizes, strict=True)}
    return [all(size < LIMIT for size in term) for term in zip(*sizes, strict=True)], bounds

"""A client's local steps, cut into pieces that can be recorded and used again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fedlight.engines.hyperparameters import Values

LONGEST = 32
"""At most so many local steps are recorded as one piece of work."""


@dataclass(frozen=True)
class Segment:
    """Consecutive local steps whose batches have the same sizes and whose hyperparameters are equal."""

    begin: int  # where its samples begin in the client's order
    sizes: tuple[int, ...]  # the micro-batches of each step
    steps: int
    values: Values

    @property
    def samples(self) -> int:
        """Samples of all its steps."""
        return self.steps * sum(self.sizes)


def segments(steps: Sequence[tuple[int, tuple[int, ...]]], values: Sequence[Values]) -> list[Segment]:
    """Cut a client's steps into segments whose lengths are powers of two, the longest first.

    So few different lengths have to be recorded: ten steps are eight and two, and a client with eleven adds one. A step
    is where its samples begin, and its micro-batches.
    """
    pieces, first = list[Segment](), 0
    while first < len(steps):
        (begin, sizes), now = steps[first], values[first]
        samples, count = sum(sizes), 1
        while (at := first + count) < len(steps) and steps[at] == (begin + count * samples, sizes):
            if values[at] is not now:
                break
            count += 1
        pieces += _cut(Segment(begin, sizes, count, now))
        first += count
    return pieces


def _cut(run: Segment) -> Iterator[Segment]:
    begin, left = run.begin, run.steps
    while left:
        steps = min(LONGEST, 1 << (left.bit_length() - 1))
        yield replace(run, begin=begin, steps=steps)
        begin, left = begin + steps * sum(run.sizes), left - steps

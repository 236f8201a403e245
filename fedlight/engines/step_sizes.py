"""Which local steps the clients of a round take alike, so that one program can serve several of them."""

from collections import Counter, defaultdict

from fedlight.engines.base import LocalTraining
from fedlight.engines.batch_order import num_batches

_SEVERAL = 3
"""From so many clients on, one batched program is faster than a program for each client alone."""


class StepSizes:
    """The sizes of the batches of local steps in an epoch of all clients, whoever trains them.

    Attributes:
        shared: sizes of the micro-batches of steps that several clients take at the same time.
        alone: those of steps that are always one client's; that depends on no round, and on no process.
        steps: of a client, on average.
        batched: programs that serve several clients, run one after the other in a round.
        single: programs that serve one client.
    """

    def __init__(self, training: LocalTraining) -> None:
        full = (training.batch_size,) * training.accumulate_grad_batches
        total, accumulate = max(1, training.sizes.total()), training.accumulate_grad_batches
        alike, longest = defaultdict[tuple[int, tuple[int, ...]], float](float), Counter[int]()
        self.steps = 0.0
        for size, clients in training.sizes.items():
            batches = num_batches(size, training.batch_size, training.limit_batches)
            each = [min(training.batch_size, size - i * training.batch_size) for i in range(batches)]
            plan = [tuple(each[i : i + accumulate]) for i in range(0, batches, accumulate)][: training.steps]
            self.steps += len(plan) * clients / total
            longest[plan.count(full)] += clients
            for sizes in set(plan) - {full}:  # clients that take as many steps take these at the same time
                alike[len(plan), sizes] += clients * training.per_round / total
        self.shared = {full for steps in longest if steps} | {sizes for (_, sizes), n in alike.items() if n >= _SEVERAL}
        self.alone = {sizes for _, sizes in alike} - self.shared
        self.single = sum(n for (_, sizes), n in alike.items() if sizes in self.alone)
        self.batched = sum(min(1.0, n) for (_, sizes), n in alike.items() if sizes in self.shared)
        below = 0.0
        for steps in sorted(longest):  # the most of K independent draws, in expectation
            up_to = below + longest[steps] / total
            self.batched += steps * (up_to**training.per_round - below**training.per_round)
            below = up_to

"""The engine that trains all clients of a process as one batched program."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from fedlight.data.arrays import ArrayDataset
from fedlight.engines.base import ClientTask, Engine, LocalTraining, named
from fedlight.engines.batch_order import StepSizes
from fedlight.engines.eager import Eager
from fedlight.engines.recordable import Unrecordable, check_recordable, explain, is_outdated, values_of_step
from fedlight.engines.vmap.programs import StackedParts
from fedlight.engines.vmap.stacked_clients import StackedClients
from fedlight.local import ClientResult
from fedlight.seeding import preserved_global_rng, seed_global_rng

_STEPS = 8
"""Steps in which a client is compared with itself in another place."""


class Vmap(Engine):
    """Trains all clients side by side: their parameters are rows of one matrix, and ``torch.func.vmap`` does the rest.

    It is for small models, whose steps are too short to keep a processor busy: above all on CPUs. Clients whose batch
    has the same size run as one program; each client takes its own number of steps. Results agree with the eager engine
    to rounding. Dropout draws other masks than the eager engine; they depend on seed, round and client only. What else
    draws (``torch.rand``, say) depends on which clients train side by side.
    What only one client does at a time, as a smaller last batch, is run for it alone. Clients whose data are made
    otherwise than the largest one's (images of another size) are trained as the eager engine does.

    With ``trainer.compile`` the program for full batches is compiled: that needs a C++ compiler and some seconds.
    With ``trainer.channels_last`` images of all clients lie as ``[B, H, W, K·C]``, as one convolution reads them.
    """

    together = True
    _eager: Eager | None = None

    def setup(self, training: LocalTraining) -> None:
        """Try a step of two clients, with as many samples as most steps have, and as few as any.

        Raises:
            MisconfigurationException: if it cannot be batched, saying why.
        """
        check_recordable(training, "vmap")
        self._training = training
        self._parts = StackedParts(training)
        self._values = values_of_step(training)
        assert training.example is not None
        assert isinstance(training.example.dataset, ArrayDataset)
        self._samples = training.example.dataset.storage.kind
        uncompiled = StackedParts(replace(training, compile=False))
        self._try_step(uncompiled, training.example, 2)
        self._parts.step.changing = uncompiled.step.changing
        for samples in StepSizes(training).tried:
            self.try_step(2, samples, 1)

    def train(self, round: int, tasks: Iterable[ClientTask]) -> Iterator[ClientResult]:
        """Train the clients, as many at once as memory allows."""
        if is_outdated(self._training, self._values):
            self._parts.programs.clear()
        tasks = iter(tasks)
        with preserved_global_rng():
            while together := list(islice(tasks, self._parts.at_once)):
                alike: dict[tuple[str, ...] | None, list[ClientTask]] = {}
                for task in together:
                    alike.setdefault(self._kind(task), []).append(task)
                for kind, group in alike.items():
                    yield from self._one_by_one(round, group) if kind is None else self._side_by_side(round, group)

    def _kind(self, task: ClientTask) -> tuple[str, ...] | None:
        """Which other models a task has, as those do that have a program in common; None where its data fit in none."""
        if not isinstance(task.dataset, ArrayDataset) or task.dataset.storage.kind != self._samples:
            return None
        return ("other",) * (task.objective.other is not None) + tuple(task.objective.references)

    def _side_by_side(self, round: int, tasks: list[ClientTask]) -> list[ClientResult]:
        seed_global_rng(tasks[0].local_seed(self._training.seed, round))
        with named(round, *(task.client for task in tasks)):
            results = StackedClients(round, tasks, self._parts).run()
        self._put_back()
        return results

    def _one_by_one(self, round: int, tasks: list[ClientTask]) -> Iterator[ClientResult]:
        if self._eager is None:
            rank_zero_info(f"trainer.engine: data of client {tasks[0].client} have another form: it trains by itself.")
            self._eager = Eager()
            self._eager.setup(replace(self._training, compile=False))
        return self._eager.train(round, tasks)

    def teardown(self) -> None:
        """Give the module's parameters storage of their own, where some clients were trained one by one."""
        if self._eager is not None:
            self._eager.teardown()
            self._eager = None

    def try_step(self, clients: int, samples: int, steps: int = _STEPS) -> Tensor:
        """Train the example so many times side by side, on so many samples a step: the parameters ``[clients, P]``.

        There are some steps, so that what is rounded differs.

        Raises:
            MisconfigurationException: if it cannot be batched, saying why.
        """
        example: Any = self._training.example
        parts = StackedParts(replace(self._training, clients=clients, limit_batches=None, compile=False))
        parts.step.changing = self._parts.step.changing  # what does not change is shared, as in a round
        example = replace(example, dataset=example.dataset.first(samples), length=(None, steps))
        return self._try_step(parts, example, clients, steps)

    def _try_step(self, parts: StackedParts, example: ClientTask, clients: int, steps: int = 1) -> Tensor:
        training = self._training
        try:
            with preserved_global_rng():
                results = StackedClients(0, [example] * clients, parts).run(steps)
            return torch.stack([result.params for result in results])
        except MisconfigurationException:
            raise
        except Exception as error:
            raise Unrecordable("vmap", explain(error, training.module, "cannot be batched over clients")) from error
        finally:
            parts.programs.clear()
            self._put_back()

    def _put_back(self) -> None:
        """What ``functional_call`` has left in the module: recurrent layers keep a list of their parameters."""
        if self._training.state is not None:
            self._training.state.restore()

"""Evaluation of one set of weights on one dataset."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate, groupby
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset
from torchmetrics import Metric

from fedlight.data.arrays import ArrayDataset, in_memory
from fedlight.data.datamodule import FederatedDataModule
from fedlight.data.reading import read_batches
from fedlight.engines.base import named
from fedlight.engines.batch_order import num_batches
from fedlight.module.hooks import Hooks
from fedlight.module.logs import LogCollector, collecting_logs, with_attributes
from fedlight.module.step import transfer_function
from fedlight.penalties.batches import batch_size
from fedlight.penalties.step import call_step, penalized_step
from fedlight.run.attempt import evaluating, say_traces, watch
from fedlight.run.clients_together import together
from fedlight.run.names import as_floats
from fedlight.seeding import derive_seed, seed_global_rng
from fedlight.server.rows import from_all

Stage = Literal["validation", "test"]
Models = Callable[[Sequence[int]], Iterable[int]]
_Logged = dict[str, tuple[Tensor, Tensor, str]]


class Evaluator:
    """Runs ``validation_step`` or ``test_step`` over a dataset, shared among the processes by batches.

    The module is evaluated with the parameters that it holds; ``untouched`` makes a context that leaves no trace in it.
    """

    def __init__(
        self,
        module: LightningModule,
        fabric: Fabric,
        datamodule: FederatedDataModule,
        hooks: Hooks,
        untouched: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._module, self._fabric, self._datamodule = module, fabric, datamodule
        self._hooks, self._untouched = hooks, untouched
        self.clients_log: bool | None = None  # whether validation logs something on clients' own data, once known
        self._separable: dict[str, bool] = {}
        self._traces_known = False
        self.transfer = transfer_function(module, fabric.device)

    def run(
        self,
        dataset: Dataset[Any],
        stage: Stage,
        limit: int | float | None = None,
        quiet: bool = False,
        share: bool = True,
        publish: Callable[[dict[str, Tensor]], None] | None = None,
    ) -> dict[str, Tensor]:
        """Evaluate and return what the module logged, reduced over all samples.

        Args:
            dataset: the data.
            stage: which step and hooks are used.
            limit: at most so many batches (int) or that fraction of them (float).
            quiet: call the module's hooks only, not the callbacks', and leave no trace in the module: any evaluation
                but that of the server's model.
            share: whether the processes share the batches; otherwise this process evaluates all of them.
            publish: receives the result before the end hook is called, so that callbacks find it; before the epoch's
                end hook what is known by then, if anyone has that hook.
        """
        dataset = in_memory(dataset, self._datamodule.eval_collate_fn)
        call: Callable[..., object] = self._hooks.module_only if quiet else self._hooks
        log = LogCollector(self._fabric.device)
        log.dtype = torch.float64 if self._fabric.device.type != "mps" else torch.float32
        world, count = self._fabric.world_size, self._num_batches(dataset, limit)
        # A process without a batch would not know what others log: where there are too few, everyone evaluates all.
        share, seen, records = share and 1 < world <= count and self._separate(dataset, stage), 0, []
        log.alone = not share
        kept = None if quiet or self._traces_known else watch(self._module)
        context = self._untouched() if quiet else nullcontext()
        with context, evaluating(self._module), collecting_logs(self._module, log), torch.no_grad():
            for metric in self._module.modules() if quiet else ():
                if isinstance(metric, Metric):  # of earlier rounds it has what the server's model did
                    metric.reset()
            seed_global_rng(derive_seed(0, "evaluation"))
            call(f"on_{stage}_start")
            call(f"on_{stage}_epoch_start")
            anew = [] if kept is None else kept.changes()
            for index, batch in self._batches(dataset, count, share):
                log.batch_size = batch_size(batch)
                seen += log.batch_size
                call(f"on_{stage}_batch_start", batch, index)
                output = self.step(stage, batch, index)
                call(f"on_{stage}_batch_end", output, batch, index)
                if share:
                    records.append((index, log.take()))
            log.batch_size = seen
            seed_global_rng(derive_seed(0, "evaluation"))  # what hooks draw depends on no batch
            if publish is not None and self._hooks.overridden(f"on_{stage}_epoch_end"):
                publish(self._reduce(log, records, keep=True) if share else log.compute(keep=True))
            call(f"on_{stage}_epoch_end")
            metrics = self._reduce(log, records) if share else log.compute()
            if publish is not None:
                publish(metrics)
            call(f"on_{stage}_end")
        if kept is not None:
            self._traces_known = True
            say_traces(self._module, stage, kept, anew)
        return metrics

    def _separate(self, dataset: Dataset[Any], stage: Stage) -> bool:
        """Whether every process may evaluate some of the batches only: none leaves anything for a later one.

        If one does (hidden states, lists of outputs), every process evaluates all batches, so that all find the same.
        """
        if stage not in self._separable:
            self._separable[stage] = self.attempt(dataset, stage)
        return self._separable[stage]

    def attempt(self, dataset: Dataset[Any], stage: Stage) -> bool:
        """Evaluate the first batch without a trace; whether it left nothing, but in torchmetrics, for later ones."""
        dataset = in_memory(dataset, self._datamodule.eval_collate_fn)
        module, call, log = self._module, self._hooks.module_only, LogCollector(self._fabric.device)
        with self._untouched(), evaluating(module, False), collecting_logs(module, log), torch.no_grad():
            call(f"on_{stage}_start")
            call(f"on_{stage}_epoch_start")
            state = watch(module)
            index, batch = next(self._batches(dataset, 1, share=False))
            call(f"on_{stage}_batch_start", batch, index)
            call(f"on_{stage}_batch_end", self.step(stage, batch, index), batch, index)
            return not state.changes()

    def prepare(self, batch: Any) -> Any:
        """A batch on the device, in the precision that steps take it in."""
        return self._fabric.strategy.precision.convert_input(self.transfer(batch))

    def loss(self, dataset: Dataset[Any]) -> float:
        """The mean of what ``training_step`` returns over a dataset, without penalties, in evaluation mode."""
        log, size = LogCollector(self._fabric.device), 0
        quiet = [step] if (step := penalized_step(self._module)) else []
        total = torch.zeros((), dtype=torch.float64)
        alone = with_attributes(quiet, {"model": "start"})
        with self._untouched(), evaluating(self._module), collecting_logs(self._module, log), alone:
            for index, batch in self._batches(dataset, self._num_batches(dataset, None), share=False):
                output, samples = self.step("training", batch, index), batch_size(batch)
                found = output["loss"] if isinstance(output, Mapping) else output
                if found is not None:  # what training skips has no loss
                    total, size = total + samples * found.detach().double().cpu(), size + samples
        return float(total / max(1, size))

    def step(self, stage: str, batch: Any, index: int) -> Any:
        """Call a step of the module as it is called in training, with its precision."""
        try:
            with self._fabric.strategy.precision.forward_context():
                return call_step(self._module, f"{stage}_step", batch, index)
        except Exception as error:
            error.add_note(f"This happened in {stage}_step, batch {index} of an evaluation.")
            if "more than 1 value per channel" not in str(error):
                raise
            raise MisconfigurationException(
                f"model: BatchNorm without running statistics cannot evaluate a batch of one sample ({error}). Set"
                f" data.eval_batch_size, which is {self._batch_size}, so that no batch has one, or track_running_stats,"
                " or use GroupNorm."
            ) from error

    def classified(self, dataset: Dataset[Any], limit: int | float | None = None) -> list[tuple[int, int]]:
        """The class of each sample, and what ``predict_step`` takes it for; by this process alone."""
        dataset, pairs = in_memory(dataset, self._datamodule.eval_collate_fn), []
        with self._untouched(), evaluating(self._module), torch.no_grad():
            for index, batch in self._batches(dataset, self._num_batches(dataset, limit), share=False):
                found = self.step("predict", batch, index)
                labels = batch[1].argmax(1) if batch[1].is_floating_point() else batch[1]
                pairs += [pair for pair in zip(labels.tolist(), found.tolist(), strict=True) if pair[0] >= 0]
        return pairs

    def client_metrics(
        self, clients: Sequence[int], limit: int | float | None = None, models: Models | None = None
    ) -> dict[int, dict[str, float]]:
        """What the module logs on each client's own validation data, in the order of the clients.

        ``models`` gives those of the clients that this process evaluates, each when the module holds its model; by
        default the module stays as it is.

        Empty where the datamodule has no such data. Where the module logs nothing on that of the first client, one
        line says so, and no client is evaluated any more.
        """
        if self.clients_log is None:  # every process asks the same client, and so comes to the same end
            first = next((m for c in clients if (m := self._on_client(c, limit)) is not None), None)
            self.clients_log = bool(first)
            if first == {}:
                rank_zero_info("clients/*: validation_step logs nothing, so no client is evaluated on its own data.")
        if not self.clients_log:
            return {}
        found = self._together(clients) if models is None else {}
        left = [client for client in clients if client not in found]
        own = self._share(left) if models is None else models(clients)
        mine = {client: self._on_client(client, limit) or {} for client in own}
        values = as_floats({f"{c} {name}": v for c, metrics in mine.items() for name, v in metrics.items()})
        found |= self._gathered({c: {n: values[f"{c} {n}"] for n in metrics} for c, metrics in mine.items()})
        return {client: found[client] for client in clients if found.get(client)}

    def _together(self, clients: Sequence[int]) -> dict[int, dict[str, float]]:
        """Those of the clients whose data are one small batch each, from few passes, where these give the same."""
        fabric, size = self._fabric, self._batch_size
        if "16" in str(fabric.strategy.precision.precision):  # what agrees there by chance depends on who is beside
            return {}
        sets = {c: in_memory(self._datamodule.client_val_dataset(c), self._datamodule.eval_collate_fn) for c in clients}
        small = {c: data for c, data in sets.items() if isinstance(data, ArrayDataset) and 0 < len(data) <= size}
        ends, found = accumulate(len(data) for data in small.values()), dict[int, dict[str, float]]()
        # Who is looked at together does not depend on the number of processes, and so neither do the bits.
        chunks = groupby(zip(small, ends, strict=True), lambda client: client[1] // size)
        try:
            with self._untouched(), evaluating(self._module), torch.no_grad():
                for chunk in self._share([[client for client, _ in several] for _, several in chunks]):
                    data, step = [small[client] for client in chunk], partial(self.step, "validation")
                    found |= zip(chunk, together(self._module, data, fabric.device, self.prepare, step), strict=True)
        except Exception:  # what is wrong with the module, if anything, is said in a client's own pass
            found = {-1: {}}  # then no client of any process is evaluated so
        found = self._gathered(found)
        return {} if -1 in found else found

    def _share(self, items: Sequence[Any]) -> Sequence[Any]:
        return items[self._fabric.global_rank :: self._fabric.world_size]

    def _gathered(self, own: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
        return {client: metrics for part in from_all(own, self._fabric.world_size) for client, metrics in part.items()}

    def _on_client(self, client: int, limit: int | float | None) -> dict[str, Tensor] | None:
        dataset = self._datamodule.client_val_dataset(client)
        if dataset is None or not len(dataset):  # type: ignore[arg-type]
            return None
        with named(self._module.trainer.current_epoch - 1, client):
            return self.run(dataset, "validation", limit, quiet=True, share=False)

    @property
    def _batch_size(self) -> int:
        return self._datamodule.eval_batch_size_on(self._fabric.device)

    def _num_batches(self, dataset: Dataset[Any], limit: int | float | None) -> int:
        return num_batches(len(dataset), self._batch_size, limit)  # type: ignore[arg-type]

    def _batches(self, dataset: Dataset[Any], count: int, share: bool) -> Iterator[tuple[int, Any]]:
        """Each batch and its index, on which alone depends what a step draws."""
        data, size, length = self._datamodule, self._batch_size, len(dataset)  # type: ignore[arg-type]
        mine = self._share(range(count)) if share else range(count)
        ends, seeds = {i: min(length, (i + 1) * size) for i in mine}, [derive_seed(0, "evaluation", i) for i in mine]
        read: Iterator[Any]
        if isinstance(dataset, ArrayDataset):
            read = (dataset.part(i * size, end, self._fabric.device) for i, end in ends.items())
        else:
            order = [list(range(i * size, end)) for i, end in ends.items()]
            read = read_batches(dataset, order, seeds, data.num_workers, data.eval_collate_fn)
        for index, seed, batch in zip(mine, seeds, read, strict=True):
            seed_global_rng(seed)
            yield index, self.prepare(batch)

    def _reduce(self, log: LogCollector, records: list[tuple[int, _Logged]], keep: bool = False) -> dict[str, Tensor]:
        """Reduce over all processes in the order of the batches, which gives the same bits as one process."""
        # What is logged once per epoch, and metrics, come after the batches, process by process.
        last = {name: (*sums, log.reduction(name)) for name, sums in log.sums(keep).items()}
        records = [*records, (2**62 + self._fabric.global_rank, last)]
        own = [(i, {n: (v.cpu(), w.cpu(), how) for n, (v, w, how) in logged.items()}) for i, logged in records]
        total, gathered = LogCollector("cpu"), from_all(own, self._fabric.world_size)
        for _, logged in sorted((record for part in gathered for record in part), key=lambda record: record[0]):
            for name, (value, weight, reduction) in logged.items():
                total.merge(name, value, weight, reduction)
        return total.compute()

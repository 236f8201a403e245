"""The Hessian of the loss over all sites' data, which nobody holds together: products are summed through the wire."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlight.analysis.hessian import hessian_operator
from fedlight.analysis.operators import Block, HessianOperator, NonFiniteLossError
from fedlight.analysis.task import TaskLoss
from fedlight.flower.messages import Parcel, part
from fedlight.run.context import RunContext
from fedlight.server.sums import ExactSums


class SiteHessian(HessianOperator):
    """∇²L for the mean loss over the training data of all sites.

    A product costs one message to every site, with the model and the vectors, and one back, with a vector for each:
    ``sites/down_mb`` and ``sites/up_mb`` count them. What a site sends is the sum over its samples; these are added up
    exactly, so that no figure depends on the order of arrival. Of ``max_samples`` each site draws its share.
    """

    def __init__(self, run: Any, loss: TaskLoss, view: str, max_samples: int | None, seed: int) -> None:
        self._of(list(loss.parameters.values()))
        self._run, self._view = run, view
        sizes = run.federation.sizes.tolist()
        part_of = 1.0 if max_samples is None else min(1.0, max_samples / sum(sizes))
        self._drawn = {client: math.ceil(n * part_of) for client, n in enumerate(sizes) if n}
        self.samples, self._info = sum(self._drawn.values()), {"seed": seed, "double": loss.dtype == torch.float64}

    def products(self, requests: Sequence[tuple[Block, Tensor]]) -> list[Tensor]:
        """See the base class; all vectors travel together."""
        vectors = {str(i): vector for i, (_, vector) in enumerate(requests)}
        found = self._ask("products", part("vectors", vectors), blocks=[list(block) for block, _ in requests])
        return [found[str(i)].to(vector) for i, (_, vector) in enumerate(requests)]

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """See the base class."""
        found = self._ask("gradient", {})
        return float(found["loss"]), found["gradient"].to(self.parameters[0])

    def loss_at(self, params: Tensor) -> float:
        """See the base class."""
        return float(self._ask("loss", part("vectors", {"0": params}))["loss"])

    def release(self) -> None:
        """Nothing is kept here."""

    def _ask(self, what: str, tensors: Mapping[str, Tensor], **info: Any) -> dict[str, Tensor]:
        """The mean over all samples of what sites sum over theirs."""
        run = self._run
        sites, side = run.trainer.sites, run.side
        side.begin(run.federation.state)
        given = {**tensors, **side.model(self._view)}
        sums, weight, clients = ExactSums(), 0.0, list(self._drawn)

        def own(some: list[int]) -> dict[str, Any]:
            return {**run.stamps(some), "drawn": {client: self._drawn[client] for client in some}}

        for parcel in sites.ask("product", clients, {**run.figures(), **self._info, "what": what, **info}, given, own):
            values = {name: value.to(self.device, torch.float64)[None] for name, value in parcel.part("sums").items()}
            if parcel.info["infinite"] or not all(bool(v.isfinite().all()) for v in values.values()):
                raise NonFiniteLossError(f"The loss or a derivative of it at {parcel.info['host']} is NaN or infinite.")
            sums.add(values)
            weight += parcel.info["weight"]
        if sites.missing:
            client, why = next(iter(sites.missing.items()))
            raise NonFiniteLossError(f"The spectrum needs all sites, and client {client} did not answer: {why}.")
        return {name: value / weight for name, value in sums.totals().items()}


def site_sums(run: RunContext, job: Parcel) -> tuple[dict[str, Tensor], float, bool]:
    """What a site contributes to :class:`SiteHessian`: sums over its samples, their weight, whether one is infinite."""
    info, data = job.info, run.datamodule
    loss = TaskLoss(run.module, torch.float64 if info["double"] else torch.float32, run.fabric.device)
    vectors = {name: v.to(run.fabric.device) for name, v in job.part("vectors").items()}
    sums, weight = dict[str, Tensor](), 0.0
    for client in info["clients"]:
        drawn = {"max_samples": info["drawn"][str(client)], "seed": info["seed"], "collate_fn": data.collate_fn}
        dataset, transfer = data.client_dataset(client), run.evaluator.transfer
        operator = hessian_operator(loss.module, dataset, loss=loss, transfer=transfer, graph_memory=0, **drawn)
        try:
            found = _found(operator, info, vectors)
        except NonFiniteLossError:
            return {}, 0.0, True
        for name, value in found.items():
            term = operator.weight * torch.as_tensor(value).double().cpu()
            sums[name] = sums[name] + term if name in sums else term
        weight += operator.weight
    return sums, weight, False


def _found(operator: HessianOperator, info: Mapping[str, Any], vectors: Mapping[str, Tensor]) -> dict[str, Any]:
    if info["what"] == "gradient":
        value, gradient = operator.loss_and_gradient()
        return {"loss": value, "gradient": gradient}
    if info["what"] == "loss":
        return {"loss": operator.loss_at(vectors["0"])}
    requests = [(tuple(block), vectors[str(i)]) for i, block in enumerate(info["blocks"])]
    return {str(i): product for i, product in enumerate(operator.products(requests))}

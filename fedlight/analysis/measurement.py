"""A measurement of curvature as a setting: what to measure, on which data, of which weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from time import perf_counter
from typing import Any, Literal, NoReturn, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from fedlight.analysis.hessian import clients_lambda_max, hessian_operator, measure_hessian
from fedlight.analysis.layers import layer_blocks
from fedlight.analysis.operators import Block, NonFiniteLossError, NoSecondDerivativeError
from fedlight.analysis.result import HessianResult
from fedlight.analysis.stochastic import TraceEstimate
from fedlight.analysis.subject import DataName, Subject
from fedlight.checks import check_at_least_one, check_number
from fedlight.seeding import preserved_global_rng

ViewName = Literal["server", "selected", "all", "swa"]


@dataclass(frozen=True)
class Measurement:
    """What to measure: the arguments of :class:`~fedlight.callbacks.HessianSpectrum`, of the same names.

    Attributes:
        who: names the owner of these settings in errors.

    Raises:
        ValueError: if a setting is out of range.
    """

    who: str
    top_k: int = 1
    density: bool = True
    trace: bool = True
    layerwise: bool | list[str] = True
    data: DataName = "train"
    max_samples: int | None = 5000
    views: Sequence[ViewName] = ("server",)
    float64: bool = False
    sam_rho: float = 0.05
    tolerance: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least_one(f"{self.who}: `top_k`", self.top_k)
        check_at_least_one(f"{self.who}: `max_samples`", 1 if self.max_samples is None else self.max_samples)
        check_number(f"{self.who}: `sam_rho`", self.sam_rho, positive=True)
        check_number(f"{self.who}: `tolerance`", self.tolerance, positive=True)
        if self.data not in ("train", "val", "clients"):
            raise ValueError(f"{self.who}: `data` must be train, val or clients, got {self.data!r}.")
        if not self.views or not set(self.views) <= set(get_args(ViewName)):
            raise ValueError(f"{self.who}: `views` must be of {', '.join(get_args(ViewName))}, got {list(self.views)}.")

    def check(self, subject: Subject) -> None:
        """Refuse what could not be measured, by the setting or the layer, before any time is spent on training."""
        size = sum(p.numel() for p in subject.module.parameters() if p.requires_grad)
        if self.top_k > size:
            self._refuse(f"`top_k: {self.top_k}`, but the model has {size} parameters, and as many eigenvalues.")
        try:
            self.blocks(subject)
        except ValueError as error:
            raise MisconfigurationException(f"{self.who}: {error}".replace("`layers`", "`layerwise`")) from error
        for view in self.views:
            if view not in (subject.weights or ("server",)):
                known = "trainer.views, which only FederatedTrainer has"
                self._refuse(f"`views` has {view!r}, which is not known here. Add it to {known}.")
        if self.data == "clients" and subject.clients is None:
            self._refuse("`data: clients`, but this trainer has none. Use `data: train`.")
        if subject.operator is not None:  # whether the loss can be differentiated twice shows where the data are
            if self.data != "train":
                self._refuse(f"`data: {self.data}` is not measured at sites. Use train.")
            return
        if subject.data(self.data) is None:
            self._refuse(f"`data: {self.data}`, but there is no validation data. Use `data: train`.")
        self._try_two_samples(subject)

    def _refuse(self, why: str) -> NoReturn:
        raise MisconfigurationException(f"{self.who}: {why}")

    def _try_two_samples(self, subject: Subject) -> None:
        """One product with a tiny Hessian, to find layers without second derivatives."""
        try:
            with torch.inference_mode(False), preserved_global_rng():
                loss = subject.loss(double=self.float64)
                few: dict[str, Any] = {"max_samples": 2, "batch_size": 2, "graph_memory": 0}
                few |= {"transfer": subject.transfer, "collate_fn": subject.collate_fn}
                operator = hessian_operator(loss.module, subject.data(self.data), loss=loss, **few)
                operator.matvec(torch.ones(operator.size, dtype=operator.dtype, device=operator.device))
        except (NoSecondDerivativeError, ValueError, TypeError) as error:
            if "NoneType" in str(error):
                return  # a hook that is still to come may bring it; that steps run is tried elsewhere
            raise MisconfigurationException(f"{self.who}: {error}") from error
        except (AttributeError, LookupError, AssertionError) as error:
            raise MisconfigurationException(
                f"{self.who}: the loss is measured in evaluation mode, and there training_step of"
                f" {type(subject.module).__name__} ends in {type(error).__name__}: {error}. Let it give a loss there."
            ) from error

    def blocks(self, subject: Subject) -> Mapping[str, Block]:
        """The parameters of each layer that is measured; none where ``layerwise`` is off."""
        if self.layerwise is False:
            return {}
        return layer_blocks(subject.module, None if self.layerwise is True else self.layerwise)

    def run(self, subject: Subject, view: ViewName = "server") -> HessianResult:
        """Measure a view. Where the loss is not finite, a warning says so and every figure is NaN.

        Every process calls it and gets the same result. The model and all random numbers are as before.
        """
        blocks = self.blocks(subject)
        with torch.inference_mode(False), preserved_global_rng():
            loss, operator = subject.hessian(self.data, view, self.max_samples, self.float64, self.seed)
            try:
                what: dict[str, Any] = {"trace": self.trace, "density": self.density, "layers": blocks or None}
                limits: dict[str, Any] = {"top_k": min(self.top_k, operator.size), "tolerance": self.tolerance}
                result = measure_hessian(operator, **what, **limits, rho=self.sam_rho, seed=self.seed)
            except NonFiniteLossError as error:
                rank_zero_warn(f"{self.who}: {error} It is logged as NaN, and the run goes on.")
                return self._undefined(operator.samples, operator.size, blocks)
            finally:
                operator.release()
            if self.data != "clients" or subject.clients is None:
                return result
            start, drawn = perf_counter(), subject.options(self.max_samples, self.seed)
            values = clients_lambda_max(loss.module, subject.clients(), double=self.float64, **drawn)
        if bad := [client for client, value in enumerate(values) if value != value]:
            rank_zero_warn(f"{self.who}: the loss of clients {bad} is NaN or infinite, and so is its λ_max.")
        return replace(result, clients=values, seconds=result.seconds | {"clients": perf_counter() - start})

    def _undefined(self, samples: int, size: int, blocks: Mapping[str, Block]) -> HessianResult:
        unknown: Any = dict.fromkeys(("loss", "gradient_norm", "sharpness", "smallest", "smallest_residual"), nan)
        unknown |= {"eigenvalues": [nan] * self.top_k, "residuals": [nan] * self.top_k, "converged": False}
        unknown |= {"layers": dict.fromkeys(blocks, nan), "clients": [nan] if self.data == "clients" else []}
        estimate = TraceEstimate(nan, nan, 0) if self.trace else None
        return HessianResult(**unknown, trace=estimate, rho=self.sam_rho, samples=samples, parameters=size)

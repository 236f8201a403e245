"""Settings: what to measure of the curvature, on which data, of which weights; and where to look at the loss."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isclose, nan
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar, Literal, NoReturn, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from fedlight.analysis.hessian import clients_lambda_max, hessian_operator, measure_hessian
from fedlight.analysis.lanczos import top_eigenvalues
from fedlight.analysis.landscape import LossLine, LossSurface, filter_normalised_directions, loss_line, loss_surface
from fedlight.analysis.layers import layer_blocks
from fedlight.analysis.operators import Block, HessianOperator, NonFiniteLossError, NoSecondDerivativeError
from fedlight.analysis.result import HessianResult
from fedlight.analysis.stochastic import TraceEstimate
from fedlight.analysis.subject import DataName, Subject, Weights
from fedlight.checks import check_number, check_whole
from fedlight.run.checkpoint import check_state_dict, load_checkpoint
from fedlight.seeding import generator, preserved_global_rng

ViewName = Literal["server", "selected", "all", "swa"]


@dataclass(eq=False, repr=False, kw_only=True)
class Measurement:
    """What to measure, as :class:`~fedlight.callbacks.HessianSpectrum` says.

    Attributes:
        who: names the owner of these settings in errors.

    Raises:
        ValueError: if a setting is out of range.
    """

    who: ClassVar[str] = "analyze"
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
        check_whole(f"{self.who}: `top_k`", self.top_k)
        check_whole(f"{self.who}: `max_samples`", 1 if self.max_samples is None else self.max_samples)
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
                few |= subject.reading(self.data)
                operator = hessian_operator(loss.module, subject.data(self.data), loss=loss, **few)
                operator.matvec(torch.ones(operator.size, dtype=operator.dtype, device=operator.device))
                with suppress(Exception):  # what takes no single samples
                    alone = hessian_operator(loss.module, subject.data(self.data), loss=loss, **few | {"batch_size": 1})
                    whole, mean = (each.loss_at(each.flat()) for each in (operator, alone))
                    if operator.samples == 2 and mean and isclose(whole, 2 * mean, rel_tol=1e-5):
                        what = "training_step gives a sum over samples: figures are as many times as large as those"
                        rank_zero_warn(f"{self.who}: {what} of their mean as a measured batch has samples.")
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
        clients = subject.clients() if self.data == "clients" and subject.clients is not None else {}
        with torch.inference_mode(False), preserved_global_rng():
            loss, operator = subject.hessian(self.data, view, self.max_samples, self.float64, self.seed)
            try:
                what: dict[str, Any] = {"trace": self.trace, "density": self.density, "layers": blocks or None}
                limits: dict[str, Any] = {"top_k": min(self.top_k, operator.size), "tolerance": self.tolerance}
                result = measure_hessian(operator, **what, **limits, rho=self.sam_rho, seed=self.seed)
            except NonFiniteLossError as error:
                rank_zero_warn(f"{self.who}: {error} It is logged as NaN, and the run goes on.")
                return self._undefined(operator.samples, operator.size, blocks, clients)
            finally:
                operator.release()
            if not clients:
                return result
            start, drawn = perf_counter(), subject.options("clients", self.max_samples, self.seed)
            values = clients_lambda_max(loss.module, [*clients.values()], double=self.float64, **drawn)
        found = dict(zip(clients, values, strict=True))
        if bad := [client for client, value in found.items() if value != value]:
            rank_zero_warn(f"{self.who}: the loss of clients {bad} is NaN or infinite, and so is its λ_max.")
        return replace(result, clients=found, seconds=result.seconds | {"clients": perf_counter() - start})

    def _undefined(
        self, samples: int, size: int, blocks: Mapping[str, Block], clients: Mapping[int, Any]
    ) -> HessianResult:
        unknown: Any = dict.fromkeys(("loss", "gradient_norm", "sharpness", "smallest", "smallest_residual"), nan)
        unknown |= {"eigenvalues": [nan] * self.top_k, "residuals": [nan] * self.top_k, "converged": False}
        unknown |= {"layers": dict.fromkeys(blocks, nan), "clients": dict.fromkeys(clients, nan)}
        estimate = TraceEstimate(nan, nan, 0) if self.trace else None
        return HessianResult(**unknown, trace=estimate, rho=self.sam_rho, samples=samples, parameters=size)


Directions = Literal["random", "eigenvectors"]
_NAMES = {
    "random": "two random directions, filter-normalised",
    "eigenvectors": "eigenvectors of the two largest eigenvalues, of length 1",
}
_RADIUS = {"random": 1.0, "eigenvectors": 0.5}


@dataclass(eq=False, repr=False)
class Survey:
    """Where to look, and on which data, as :class:`~fedlight.callbacks.LossLandscape` says.

    Attributes:
        who: names the owner of these settings in errors.

    Raises:
        ValueError: if a setting is out of range.
    """

    who: ClassVar[str] = "analyze"
    directions: Directions = "random"
    radius: float | None = None
    points: int = 17
    data: DataName = "train"
    max_samples: int | None = 1000
    float64: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.directions not in _NAMES:
            raise ValueError(f"{self.who}: `directions` must be random or eigenvectors, got {self.directions!r}.")
        check_number(f"{self.who}: `radius`", 1 if self.radius is None else self.radius, positive=True)
        check_whole(f"{self.who}: `max_samples`", 1 if self.max_samples is None else self.max_samples)
        check_whole(f"{self.who}: `points`", self.points, 3)
        if self.data not in ("train", "val"):
            raise ValueError(f"{self.who}: `data` must be train or val, got {self.data!r}.")

    def check(self, subject: Subject, view: str) -> None:
        """Refuse what could not be looked at, by the setting."""
        if view not in (subject.weights or ("server",)):
            known = "trainer.views, which only FederatedTrainer has"
            raise MisconfigurationException(f"{self.who}: view {view!r} is not known here. Add it to {known}.")
        if subject.operator is not None:
            raise MisconfigurationException(f"{self.who}: the loss is not drawn where data are at sites. Leave it out.")
        if subject.data(self.data) is None:
            raise MisconfigurationException(f"{self.who}: `data: val`, but there is no validation data. Use `train`.")

    def surface(self, subject: Subject, view: str = "server") -> LossSurface:
        """The loss on a plane through the weights of a view. Every process calls it and gets the same."""
        with torch.inference_mode(False), preserved_global_rng():
            _, operator = subject.hessian(self.data, view, self.max_samples, self.float64, self.seed)
            try:
                vectors = self._vectors(operator)
            except NonFiniteLossError:  # then there are none, and the surface shows it
                vectors = torch.zeros(2, operator.size)
            radius, name = self.radius or _RADIUS[self.directions], _NAMES[self.directions]
            return loss_surface(operator, vectors, radius=radius, points=self.points, name=name)

    def line(self, subject: Subject, other: Weights, view: str = "server") -> dict[str, LossLine]:
        """The losses, in training and in validation where there is such data, from a view (t = 0) to other weights."""
        lines, points = {}, 2 * self.points - 1
        names: dict[DataName, str] = {"train": "training", "val": "validation"}
        with torch.inference_mode(False), preserved_global_rng():
            for data in (data for data in names if subject.data(data) is not None):
                loss, operator = subject.hessian(data, view, self.max_samples, self.float64, self.seed)
                mixed = _mixing(loss.module, other[1])
                lines[names[data]] = loss_line(operator, operator.flat(), other[0], points=points, before_each=mixed)
        return lines

    def _vectors(self, operator: HessianOperator) -> Tensor:
        rng = generator(self.seed, "landscape directions")
        if self.directions == "random":
            return filter_normalised_directions(operator.parameters, rng)
        pairs = top_eigenvalues(operator, 2, generator=rng, smallest=False, tolerance=1e-2)
        operator.release()
        return pairs.vectors


def _mixing(module: nn.Module, others: dict[str, Tensor]) -> Callable[[float], None]:
    """Sets a module's buffers to (1 − t)·its own + t·others; what is not a floating-point number changes at t = ½."""
    tensors = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    sets = [(tensors[name].detach(), tensors[name].detach().clone(), others[name].to(tensors[name])) for name in others]

    def mix(t: float) -> None:
        for value, own, other in sets:
            value.copy_(torch.lerp(own, other, t) if value.is_floating_point() else other if t > 0.5 else own)

    return mix


def checkpoint_weights(path: str | Path, subject: Subject, view: str, who: str) -> Weights:
    """Parameters and buffers of a view in a checkpoint of the same model; other files are refused."""
    try:
        checkpoint = load_checkpoint(Path(path))
        check_state_dict(Path(path), checkpoint["state_dict"], subject.module)
    except MisconfigurationException as error:
        raise MisconfigurationException(str(error).replace("ckpt_path=", f"{who}: line_to=")) from error
    server = checkpoint["fedlight"]["server"]
    views = {"server": server["algorithm"]["params"], **server["views"]}
    if view not in views:
        raise MisconfigurationException(f"{who}: line_to={str(path)!r} does not hold view {view!r}.")
    return views[view], server["buffers"]


def run_name(path: str | Path) -> str:
    """What to call the model of a checkpoint in a picture: its run, or the file where it lies in none."""
    path = Path(path).resolve()
    in_run = path.parent.name == "checkpoints"
    return "/".join(path.parent.parent.parts[-2:]) if in_run else path.stem

"""A look at the loss around a model, or between two, as a setting."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from fedlight.analysis.lanczos import top_eigenvalues
from fedlight.analysis.landscape import LossLine, LossSurface, filter_normalised_directions, loss_line, loss_surface
from fedlight.analysis.operators import HessianOperator, NonFiniteLossError
from fedlight.analysis.pictures import draw_contour, draw_line, draw_surface
from fedlight.analysis.subject import DataName, Subject, Weights
from fedlight.checks import check_at_least_one, check_number
from fedlight.run.checkpoint import check_state_dict, load_checkpoint
from fedlight.seeding import generator, preserved_global_rng

Directions = Literal["random", "eigenvectors"]
_NAMES = {
    "random": "two random directions, filter-normalised",
    "eigenvectors": "eigenvectors of the two largest eigenvalues, of length 1",
}
_RADIUS = {"random": 1.0, "eigenvectors": 0.5}


@dataclass(frozen=True)
class Survey:
    """Where to look, and on which data: the arguments of :class:`~fedlight.callbacks.LossLandscape`, of the same names.

    Attributes:
        who: names the owner of these settings in errors.

    Raises:
        ValueError: if a setting is out of range.
    """

    who: str
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
        check_at_least_one(f"{self.who}: `max_samples`", 1 if self.max_samples is None else self.max_samples)
        if self.points < 3:
            raise ValueError(f"{self.who}: `points` must be at least 3, got {self.points}.")
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


def draw_survey(surface: LossSurface, folder: Path, stem: str) -> list[Path]:
    """Draw a surface as ``plots/landscape<stem>_contour.png`` and ``_surface.png``, and save its grid.

    Where the loss is nowhere finite, a warning says so and nothing is drawn.
    """
    surface.save(folder / "hessian" / f"landscape{stem}.npz")
    if not bool(surface.loss.isfinite().any()):
        rank_zero_warn("The loss is nowhere finite around this model, so its landscape is not drawn.")
        return []
    kinds = {"contour": draw_contour, "surface": draw_surface}
    return [draw(surface, folder / "plots" / f"landscape{stem}_{kind}.png") for kind, draw in kinds.items()]


def draw_lines(lines: dict[str, LossLine], folder: Path, stem: str, ends: tuple[str, str]) -> Path:
    """Draw the losses between two models as ``plots/line<stem>.png``, and save them."""
    for name, line in lines.items():
        line.save(folder / "hessian" / f"line{stem}_{name}.npz")
    return draw_line(lines, folder / "plots" / f"line{stem}.png", ends)

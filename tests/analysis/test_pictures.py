import ast
from pathlib import Path

import pytest
import torch

import fedlight.analysis
from benchmarks.hessian_samples import draw_sampling_error
from fedlight.analysis import Density, HessianResult
from fedlight.analysis import pictures as p
from fedlight.analysis.landscape import LossLine, LossSurface
from fedlight.analysis.pictures import LayerHistory, draw_layers

GRID = torch.linspace(-1, 1, 9, dtype=torch.float64)
BOWL = GRID[:, None] ** 2 + 3 * GRID**2


def result(scale: float = 1.0) -> HessianResult:
    grid = torch.linspace(-1, 10, 50, dtype=torch.float64) * scale
    values = torch.exp(-(grid**2)) + 1e-9
    spectrum = Density(grid[None], torch.full((1, 50), 0.02, dtype=torch.float64), grid, values, 0.1)
    return HessianResult(
        1.0, 0.1, 0.0, 0.05, [9.0 * scale, 3.0], [0.1, 0.2], -0.5, 0.0, density=spectrum, parameters=99
    )


def is_picture(path) -> bool:
    data = path.read_bytes()
    return data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 5000


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: p.draw_density(result(), path),
        lambda path: p.draw_density({"FedAvg": result(), "FedAvg+MAN": result(0.5)}, path),
        lambda path: p.draw_eigenvalues([0], [result()], path),
        lambda path: p.draw_eigenvalues([0, 5], [result(), result(2.0)], path),
        lambda path: p.draw_contour(LossSurface(GRID, GRID, BOWL, "two directions"), path),
        lambda path: p.draw_surface(LossSurface(GRID, GRID, BOWL, "two directions"), path),
        lambda path: p.draw_line({"a": LossLine(GRID, GRID**2), "b": LossLine(GRID, GRID)}, path, ("FedAvg", "MAN")),
        lambda path: p.draw_line(LossLine(GRID, GRID**2), path),
        lambda path: draw_sampling_error([10, 100], {"λ_max": [[0.1, -0.2], [0.03, 0.01]]}, path),
        lambda path: draw_layers([LayerHistory(f"l{i}", {0: 2.0, 5: 1.0}, {0: 1.0, 1: 0.5}) for i in range(5)], path),
        lambda path: draw_layers([LayerHistory("logits", {0: 2.0})], path),
        lambda path: draw_layers(
            [LayerHistory("l0", {4: 2.0}, {3: 1.0, 4: 0.5}), LayerHistory("logits", {4: -0.1})], path
        ),
    ],
)
def test_every_picture_is_drawn(draw, tmp_path):
    path = draw(tmp_path / "plots" / "picture.png")
    assert path == tmp_path / "plots" / "picture.png"
    assert is_picture(path)


def test_a_loss_that_is_not_finite_in_places_is_drawn(tmp_path):
    loss = BOWL.clone()
    loss[0, 0], loss[1, 1] = float("inf"), float("nan")
    surface = LossSurface(GRID, GRID, loss, "two directions")
    assert is_picture(p.draw_contour(surface, tmp_path / "c.png"))
    assert is_picture(p.draw_surface(surface, tmp_path / "s.png"))
    flat = LossSurface(GRID, GRID, torch.zeros(9, 9, dtype=torch.float64), "two directions")
    assert is_picture(p.draw_contour(flat, tmp_path / "f.png"))


def test_what_is_not_there_is_said(tmp_path):
    nothing = HessianResult(1.0, 0.1, 0.0, 0.05, [1.0], [0.0], 0.0, 0.0)
    with pytest.raises(ValueError, match="no density of the model"):
        p.draw_density(nothing, tmp_path / "a.png")
    with pytest.raises(ValueError, match="no layers"):
        draw_layers([], tmp_path / "a.png")
    with pytest.raises(ValueError, match="nowhere finite"):
        p.draw_contour(LossSurface(GRID, GRID, BOWL * float("nan"), ""), tmp_path / "a.png")


def test_drawing_and_solver_packages_are_imported_where_they_are_used():
    """``import fedlight`` stays fast: what only some analyses need is imported inside of functions."""
    for path in Path(fedlight.analysis.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"matplotlib", "scipy", "curvlinops"}, path.name


def test_a_picture_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(figure, file, **settings):
        (file.write if hasattr(file, "write") else file.write_bytes)(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "curves.png").write_bytes(b"whole")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space"):
        p.drawn(tmp_path / "curves.png", lambda figure: None, (1, 1))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("curves.png", b"whole")]

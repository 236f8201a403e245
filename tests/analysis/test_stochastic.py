import pytest
import torch

from fedlight.analysis import NonFiniteLossError, density, top_eigenvalues, trace
from tests.analysis.cases import NETS, Matrix, case, operator, rng

OUTLIERS = [*torch.linspace(-1, 1, 300).tolist(), 20.0, 50.0]


def moment(spectrum, order):
    """The mean of λ^order over all eigenvalues, and its standard error."""
    samples = (spectrum.weights * spectrum.nodes**order).sum(1)
    return float(samples.mean()), float(samples.std(correction=min(1, len(samples) - 1))) / len(samples) ** 0.5


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("seed", range(3))
def test_traces_lie_within_three_standard_errors(name, seed):
    exact, op = case(name)[3].trace().item(), operator(name, 16)
    plain = trace(op, generator=rng(seed), tolerance=1e-6, max_probes=40)
    assert plain.probes == 40
    assert abs(plain.value - exact) < 3 * plain.error
    pairs = top_eigenvalues(op, 3, generator=rng(), tolerance=1e-6)
    known = trace(op, generator=rng(seed), tolerance=1e-6, max_probes=40, known=(pairs.values, pairs.vectors))
    assert abs(known.value - exact) < 3 * known.error


def test_known_eigenvectors_take_their_variance_out_of_the_trace():
    matrix = Matrix.with_spectrum(OUTLIERS)
    pairs = top_eigenvalues(matrix, 2, generator=rng(), tolerance=1e-9)
    plain = trace(matrix, generator=rng(1), tolerance=1e-6)
    known = trace(matrix, generator=rng(1), tolerance=1e-6, known=(pairs.values, pairs.vectors))
    assert abs(known.value - 70) < 3 * known.error
    assert known.error < plain.error / 2


def test_the_trace_stops_at_its_tolerance():
    matrix = Matrix(torch.diag(torch.arange(1.0, 51.0)))  # signs see a diagonal exactly
    estimate = trace(matrix, generator=rng(), tolerance=0.01)
    assert (estimate.value, estimate.error, estimate.probes) == (1275.0, 0.0, 8)
    assert trace(matrix, generator=rng(), max_probes=1).probes == 2


def test_the_standard_error_is_that_of_the_mean():
    matrix = Matrix.with_spectrum(OUTLIERS)
    estimates = [trace(matrix, generator=rng(seed), tolerance=1e-9, max_probes=32) for seed in range(100)]
    spread = torch.tensor([e.value for e in estimates]).std().item()
    mean_error = sum(e.error for e in estimates) / 100
    assert spread == pytest.approx(mean_error, rel=0.2)


@pytest.mark.parametrize("name", NETS)
def test_the_first_four_moments_of_the_density(name):
    eigenvalues = torch.linalg.eigvalsh(case(name)[3])
    spectrum = density(operator(name, 16), generator=rng(1), steps=20, probes=40)
    for order in range(1, 5):
        value, error = moment(spectrum, order)
        assert abs(value - (eigenvalues**order).mean().item()) < 3 * error, order
    assert moment(spectrum, 0)[0] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", NETS)
def test_known_eigenvectors_make_the_moments_more_certain(name):
    op, eigenvalues = operator(name), torch.linalg.eigvalsh(case(name)[3])
    pairs = top_eigenvalues(op, 3, generator=rng(), tolerance=1e-8)
    plain = density(op, generator=rng(1), steps=20, probes=40)
    known = density(op, generator=rng(1), steps=20, probes=40, known=(pairs.values, pairs.vectors))
    for order in range(1, 5):
        value, error = moment(known, order)
        assert abs(value - (eigenvalues**order).mean().item()) < 3 * error, order
    assert moment(known, 4)[1] < moment(plain, 4)[1] / 2
    assert moment(known, 0)[0] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("steps", [4, 40])
def test_quadrature_is_exact_for_low_moments_of_each_probe(steps):
    matrix = Matrix.with_spectrum(OUTLIERS)
    spectrum = density(matrix, generator=rng(3), steps=steps, probes=2)
    source = rng(3)
    vectors = torch.stack([torch.randn(matrix.size, generator=source) for _ in range(2)]).double()
    power = vectors
    for order in range(1, 5):
        power = power @ matrix.matrix
        wanted = (power * vectors).sum(1) / vectors.square().sum(1)
        torch.testing.assert_close((spectrum.weights * spectrum.nodes**order).sum(1), wanted, rtol=1e-10, atol=1e-12)


def test_the_smoothed_density_covers_the_whole_range():
    spectrum = density(Matrix.with_spectrum(OUTLIERS), generator=rng(), steps=60, probes=8)
    mass = torch.trapezoid(spectrum.values, spectrum.grid).item()
    assert mass == pytest.approx(1, abs=1e-4)
    assert spectrum.grid[0] < -1
    assert spectrum.grid[-1] > 50
    negative = torch.trapezoid(spectrum.values[spectrum.grid < 0], spectrum.grid[spectrum.grid < 0]).item()
    assert negative == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_outliers_have_their_exact_weight(dtype):
    matrix = Matrix.with_spectrum(OUTLIERS, dtype)
    pairs = top_eigenvalues(matrix, 2, generator=rng(), tolerance=1e-8)
    spectrum = density(matrix, generator=rng(), probes=1, known=(pairs.values, pairs.vectors))
    for centre in (20, 50):
        near = (spectrum.grid - centre).abs() < 5
        weight = torch.trapezoid(spectrum.values[near], spectrum.grid[near]).item()
        assert weight == pytest.approx(1 / 302, rel=1e-3)
    assert moment(spectrum, 1)[0] == pytest.approx(70 / 302, rel=0.3)


def test_ghosts_share_the_weight_of_the_eigenvalue_that_they_repeat():
    spectrum = density(Matrix.with_spectrum([*[0.0] * 199, 10.0], torch.float32), generator=rng(), steps=30, probes=40)
    near = (spectrum.nodes - 10).abs() < 0.1
    weight = (spectrum.weights * near).sum(1)
    assert weight.mean().item() == pytest.approx(1 / 200, rel=0.5)
    assert moment(spectrum, 1)[0] == pytest.approx(0.05, rel=0.5)


def test_zero_curvature_is_a_peak_at_zero():
    zero = Matrix(torch.zeros(50, 50))
    spectrum = density(zero, generator=rng())
    assert torch.isfinite(spectrum.values).all()
    assert spectrum.grid[spectrum.values.argmax()].item() == pytest.approx(0, abs=spectrum.width)
    assert trace(zero, generator=rng()) == trace(zero, generator=rng(5))


def test_what_is_not_finite_stops_both():
    matrix = torch.eye(20)
    matrix[0, 0] = float("inf")
    with pytest.raises(NonFiniteLossError):
        trace(Matrix(matrix), generator=rng())
    with pytest.raises(NonFiniteLossError):
        density(Matrix(matrix), generator=rng())

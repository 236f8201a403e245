import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh

from fedlight.analysis import NonFiniteLossError, layer_blocks, top_eigenvalues
from fedlight.analysis.lanczos import block_eigenvalues
from tests.analysis.cases import NETS, Matrix, case, operator, rng

BULK = torch.linspace(-1, 1, 200).tolist()
SPECTRA = {
    "clustered": [*BULK, 5.0, 5.0 - 1e-6, 5.0 - 2e-6],
    "degenerate": [*BULK, 5.0, 5.0, 5.0, 2.0],
    "degenerate_at_the_cut": [*BULK, 6.0, 5.0, 4.0, 4.0, 4.0],
    "negative": [-3.0, -3.0, *(-0.1 - 0.01 * i for i in range(150))],
    "outlier": [*BULK, 1e6, 3.0, 2.5],
    "identity": [2.0] * 100,
    "zero": [0.0] * 100,
    "one_direction": [0.0] * 99 + [7.0],
}


@pytest.mark.parametrize("name", SPECTRA)
def test_chosen_spectra_in_float64(name):
    wanted = sorted(SPECTRA[name], reverse=True)
    matrix = Matrix.with_spectrum(SPECTRA[name])
    pairs = top_eigenvalues(matrix, 4, generator=rng(), tolerance=1e-11, max_products=2000)
    scale = max(abs(wanted[0]), abs(wanted[-1]))
    assert pairs.converged
    assert pairs.values.tolist() == pytest.approx(wanted[:4], rel=1e-8, abs=1e-12 * scale)
    assert pairs.smallest.values.item() == pytest.approx(wanted[-1], rel=1e-8, abs=1e-8 * scale)
    assert pairs.products == matrix.products
    for value, vector, residual in zip(pairs.values, pairs.vectors, pairs.residuals, strict=True):
        assert vector.norm().item() == pytest.approx(1, abs=1e-12)
        assert (matrix.matrix @ vector - value * vector).norm().item() == pytest.approx(
            residual.item(), rel=1e-3, abs=1e-14 * scale
        )


@pytest.mark.parametrize("name", [name for name in SPECTRA if name != "outlier"])
def test_chosen_spectra_in_float32(name):
    wanted = sorted(SPECTRA[name], reverse=True)
    pairs = top_eigenvalues(Matrix.with_spectrum(SPECTRA[name], torch.float32), 4, generator=rng())
    scale = max(abs(wanted[0]), abs(wanted[-1]))
    assert pairs.values.tolist() == pytest.approx(wanted[:4], rel=1e-3, abs=2e-5 * scale)
    assert pairs.vectors.dtype == torch.float32


def test_an_outlier_in_float32_hides_nothing_of_itself():
    pairs = top_eigenvalues(Matrix.with_spectrum(SPECTRA["outlier"], torch.float32), 1, generator=rng())
    assert pairs.values[0].item() == pytest.approx(1e6, rel=1e-6)


def test_restarts_find_what_a_small_basis_cannot_hold():
    matrix = Matrix.with_spectrum([i / 400 for i in range(400)])  # no gap anywhere
    pairs = top_eigenvalues(matrix, 3, generator=rng(), tolerance=1e-10, basis=12, max_products=5000)
    assert pairs.products > 12
    assert pairs.values.tolist() == pytest.approx([399 / 400, 398 / 400, 397 / 400], rel=1e-8)
    assert pairs.smallest.values.item() == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("name", NETS)
def test_networks_against_dense_hessian_and_scipy(name):
    op = operator(name, 7)
    wanted = torch.linalg.eigvalsh(case(name)[3]).flip(0)
    pairs = top_eigenvalues(op, 5, generator=rng(), tolerance=1e-10, max_products=2000)
    torch.testing.assert_close(pairs.values, wanted[:5], rtol=1e-8, atol=0)
    torch.testing.assert_close(pairs.smallest.values, wanted[-1:], rtol=1e-8, atol=0)
    dense = LinearOperator((op.size, op.size), lambda v: op.matvec(torch.from_numpy(v)).numpy(), dtype="float64")
    theirs = eigsh(dense, k=5, which="LA", return_eigenvectors=False)
    assert pairs.values.tolist() == pytest.approx(sorted(theirs, reverse=True), rel=1e-8)


@pytest.mark.parametrize("name", NETS)
def test_every_layer_against_its_dense_block(name):
    op, dense, module = operator(name, 16), case(name)[3], case(name)[0]
    blocks = layer_blocks(module)
    offsets = torch.tensor([0, *(p.numel() for p in op.parameters)]).cumsum(0).tolist()
    found = block_eigenvalues(op, blocks, generator=rng(), tolerance=1e-10)
    assert sorted(i for block in blocks.values() for i in block) == list(range(len(op.parameters)))
    for layer, block in blocks.items():
        rows = torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in block])
        wanted = torch.linalg.eigvalsh(dense[rows][:, rows])[-1]
        assert found[layer].values.item() == pytest.approx(wanted.item(), rel=1e-8), layer


def test_the_start_does_not_matter_but_repeats():
    matrix = Matrix.with_spectrum(SPECTRA["clustered"])
    first, again, other = (top_eigenvalues(matrix, 2, generator=rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.vectors, again.vectors)
    torch.testing.assert_close(first.values, other.values, rtol=1e-5, atol=0)


def test_too_few_products_are_said():
    matrix = Matrix.with_spectrum([i / 400 for i in range(400)])
    with pytest.warns(UserWarning, match="did not converge within 10 products"):
        pairs = top_eigenvalues(matrix, 1, generator=rng(), tolerance=1e-10, max_products=10)
    assert not pairs.converged
    assert pairs.residuals[0] > 1e-6


def test_more_eigenvalues_than_there_are_parameters_are_cut():
    matrix = Matrix.with_spectrum([3.0, 1.0, -2.0])
    with pytest.warns(UserWarning, match="`top_k` is 5, but the model has 3 parameters"):
        pairs = top_eigenvalues(matrix, 5, generator=rng(), tolerance=1e-9)
    assert pairs.values.tolist() == pytest.approx([3, 1, -2])
    assert pairs.smallest.values.item() == pytest.approx(-2)
    assert top_eigenvalues(matrix, 3, generator=rng()).values.tolist() == pytest.approx([3, 1, -2])


def test_one_parameter():
    pairs = top_eigenvalues(Matrix(torch.tensor([[4.0]])), 1, generator=rng())
    assert pairs.values.tolist() == [4.0]
    assert pairs.smallest.values.tolist() == [4.0]


@pytest.mark.parametrize(("k", "tolerance", "message"), [(0, 1e-3, "`top_k`"), (1, 0.0, "`tolerance`")])
def test_bad_arguments(k, tolerance, message):
    with pytest.raises(ValueError, match=message):
        top_eigenvalues(Matrix.with_spectrum([1.0, 2.0]), k, generator=rng(), tolerance=tolerance)


def test_a_product_that_is_not_finite_stops_the_search():
    matrix = torch.eye(20)
    matrix[3, 3] = float("nan")
    with pytest.raises(NonFiniteLossError):
        top_eigenvalues(Matrix(matrix), 1, generator=rng())

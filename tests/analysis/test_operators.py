import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedlight.analysis import HessianOperator, NonFiniteLossError
from fedlight.analysis.memory import free_memory, graph_bytes
from tests.analysis.cases import NETS, case, operator


@pytest.mark.parametrize("name", NETS)
def test_products_are_those_of_the_dense_hessian(name):
    dense, op = case(name)[3], operator(name)
    torch.testing.assert_close(op.matmat(torch.eye(op.size, dtype=torch.float64)), dense, rtol=1e-10, atol=1e-14)
    v = torch.randn(op.size, dtype=torch.float64)
    torch.testing.assert_close(op.matvec(v), dense @ v, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("batch_size", [1, 7, 30])
@pytest.mark.parametrize("graph_memory", [0, 10_000, None])
def test_batches_of_any_size_give_the_same_operator(batch_size, graph_memory):
    dense, op = case("mlp")[3], operator("mlp", batch_size, graph_memory=graph_memory)
    vectors = torch.randn(op.size, 3, dtype=torch.float64)
    for _ in range(2):  # with the graphs of the first call, where they are kept
        torch.testing.assert_close(op.matmat(vectors), dense @ vectors, rtol=1e-10, atol=1e-13)
    module, x, y, _ = case("mlp")
    loss, gradient = op.loss_and_gradient()
    whole = F.cross_entropy(module.net(x), y)
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(whole, list(module.parameters()))])
    assert loss == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


def test_a_graph_is_built_once_where_memory_allows():
    calls = []

    def counted(memory):
        w = nn.Parameter(torch.tensor([1.0, 2.0]))
        op = HessianOperator(
            lambda batch, index: calls.append(index) or (w**4).sum() * batch.mean(),
            [w],
            [torch.ones(3), torch.ones(3)],
            graph_memory=memory,
        )
        calls.clear()
        for _ in range(5):
            torch.testing.assert_close(op.matvec(torch.ones(2)), torch.tensor([12.0, 48.0]))
        return len(calls)

    assert counted(0) == 10
    assert counted(10**6) == 3  # one more to measure the first
    assert counted(1) == 11


def test_blocks_are_those_of_the_dense_hessian():
    dense, op = case("mlp")[3], operator("mlp", 7)
    lengths = [p.numel() for p in op.parameters]
    v = torch.randn(lengths[0] + lengths[1], dtype=torch.float64), torch.randn(lengths[4], dtype=torch.float64)
    first, second = op.products([((0, 1), v[0]), ((4,), v[1])])
    begin, end = lengths[0] + lengths[1], sum(lengths[:4])
    torch.testing.assert_close(first, dense[:begin, :begin] @ v[0])
    torch.testing.assert_close(second, dense[end : end + lengths[4], end : end + lengths[4]] @ v[1])


def test_loss_elsewhere_leaves_the_parameters_and_kept_graphs_alone():
    module, x, y, dense = case("mlp")
    op = operator("mlp", 16)
    v, before = torch.randn(op.size, dtype=torch.float64), op.flat()
    op.matvec(v)  # graphs are kept
    moved = before + 0.1
    net = operator("mlp").loss_at(moved)
    assert op.loss_at(moved) == pytest.approx(net, rel=1e-12)
    assert net != pytest.approx(F.cross_entropy(module.net(x), y).item(), rel=1e-3)
    assert torch.equal(op.flat(), before)
    torch.testing.assert_close(op.matvec(v), dense @ v)


def test_unused_and_linear_parameters_have_zero_curvature():
    used, unused, linear = (nn.Parameter(torch.tensor([v])) for v in (2.0, 3.0, 4.0))
    op = HessianOperator(lambda batch, index: (used**3 + linear).sum(), [used, unused, linear], [torch.ones(1)])
    assert op.matvec(torch.ones(3)).tolist() == [12.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_has_an_error_of_its_own(bad):
    w = nn.Parameter(torch.ones(2))
    op = HessianOperator(lambda batch, index: (w * bad).sum(), [w], [torch.ones(1)])
    with pytest.raises(NonFiniteLossError, match=f"loss is {bad}"):
        op.loss_and_gradient()


def test_no_data_and_no_parameters_are_refused():
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="no data"):
        HessianOperator(lambda batch, index: w.sum(), [w], [])
    with pytest.raises(ValueError, match="trainable parameter"):
        HessianOperator(lambda batch, index: w.sum(), [], [torch.ones(1)])
    with pytest.raises(ValueError, match="share one data type"):
        HessianOperator(lambda batch, index: w.sum(), [w, w.double()], [torch.ones(1)])


def test_a_loss_that_does_not_reach_the_parameters_is_refused():
    w = nn.Parameter(torch.ones(2))
    other = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="does not depend"):
        HessianOperator(lambda batch, index: (other**2).sum(), [w], [torch.ones(1)]).matvec(torch.ones(2))


def test_memory_of_a_graph_is_that_of_what_it_saves():
    x = torch.randn(1000)  # float32: 4000 bytes
    w = nn.Parameter(torch.ones(1000))
    assert graph_bytes(lambda: (w * x).exp(), [w]) == 8000  # x, and the result of exp
    assert free_memory(torch.device("cpu")) > 0

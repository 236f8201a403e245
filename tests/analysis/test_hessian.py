import copy
import math
import multiprocessing

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fedlight.analysis import (
    HessianResult,
    NonFiniteLossError,
    clients_lambda_max,
    hessian_operator,
    layer_blocks,
    measure_hessian,
)
from fedlight.data.arrays import ArrayDataset
from fedlight.models import Classifier
from tests.analysis.cases import NETS, Task, case, dense_hessian, mlp, operator


@pytest.mark.parametrize("name", NETS)
def test_a_measurement_against_the_dense_hessian(name):
    module, _, _, dense = case(name)
    result = measure_hessian(operator(name, 16), top_k=3, tolerance=1e-10, layers=layer_blocks(module), density=True)
    wanted = torch.linalg.eigvalsh(dense).flip(0)
    assert result.eigenvalues == pytest.approx(wanted[:3].tolist(), rel=1e-8)
    assert result.smallest == pytest.approx(wanted[-1].item(), rel=1e-8)
    assert abs(result.trace.value - wanted.sum().item()) < 3 * result.trace.error
    assert result.samples == 30
    assert result.parameters == len(dense)
    assert list(result.layers) == list(layer_blocks(module))
    vectors = result.eigenvectors
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)


def test_sharpness_is_the_rise_of_the_loss_along_the_gradient():
    module, x, y, _ = case("mlp")
    result = measure_hessian(operator("mlp"), rho=0.3)
    clone = Task(mlp()).double()
    clone.load_state_dict(module.state_dict())
    loss = nn.functional.cross_entropy(clone.net(x), y)
    gradients = torch.autograd.grad(loss, list(clone.parameters()))
    norm = sum(g.square().sum() for g in gradients).sqrt()
    with torch.no_grad():
        for p, g in zip(clone.parameters(), gradients, strict=True):
            p += 0.3 * g / norm
        risen = nn.functional.cross_entropy(clone.net(x), y)
    assert result.gradient_norm == pytest.approx(norm.item(), rel=1e-10)
    assert result.sharpness == pytest.approx((risen - loss).item(), rel=1e-8)


def test_a_dead_network_has_no_curvature_and_divides_by_nothing():
    module = Task(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3, bias=False)))
    nn.init.constant_(module.net[0].bias, -1e6)
    batches = [(torch.randn(20, 6), torch.arange(20) % 3)]
    result = measure_hessian(hessian_operator(module, batches), top_k=3, density=True, layers=layer_blocks(module))
    assert result.eigenvalues == [0, 0, 0]
    assert (result.smallest, result.trace.value, result.trace.error) == (0, 0, 0)
    assert (result.gradient_norm, result.sharpness) == (0, 0)
    assert result.layers == {"net.0": 0, "net.2": 0}
    assert result.converged
    assert torch.isfinite(result.density.values).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_reported(bad):
    module = Task(mlp())
    module.net[4].bias.data[0] = bad
    with pytest.raises(NonFiniteLossError, match="not defined at these parameters"):
        measure_hessian(hessian_operator(module, [(torch.ones(4, 6), torch.arange(4) % 3)]))


def test_an_infinite_curvature_is_reported():
    class Kink(Task):  # finite loss and gradient at 0, infinite second derivative
        def training_step(self, batch, batch_idx):
            return (self.net[0].bias.abs() ** 1.5).sum() + super().training_step(batch, batch_idx)

    module = Kink(mlp())
    module.net[0].bias.data.fill_(0.0)
    with pytest.raises(NonFiniteLossError, match="no finite curvature"):
        measure_hessian(hessian_operator(module, [(torch.ones(4, 6), torch.arange(4) % 3)]))


def test_layers_by_name():
    module = case("mlp")[0]
    assert layer_blocks(module) == {"net.0": (0, 1), "net.2": (2, 3), "net.4": (4, 5)}
    assert layer_blocks(module, ["net.4"]) == {"net.4": (4, 5)}
    with pytest.raises(ValueError, match=r"`layers` names 'net\.3'.*The layers are: net\.0, net\.2, net\.4"):
        layer_blocks(module, ["net.3"])
    with pytest.raises(ValueError, match=r"Did you mean 'net\.0'"):
        layer_blocks(module, ["net0"])


def test_tied_and_own_parameters_belong_to_the_first_layer():
    assert layer_blocks(case("tied_weights")[0]) == {"net.first": (0, 1), "net.second": (2,), "net.head": (3, 4)}

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    assert layer_blocks(Own()) == {"root": (0,)}


def test_clients_are_measured_on_their_own_losses():
    module, x, y, _ = case("mlp")
    parts = [(0, 10), (10, 18), (18, 30)]
    clients = [ArrayDataset(x[a:b], y[a:b]) for a, b in parts]
    found = clients_lambda_max(module, clients, double=True, tolerance=1e-10, batch_size=4)
    wanted = [torch.linalg.eigvalsh(dense_hessian(module.net, x[a:b], y[a:b]))[-1].item() for a, b in parts]
    assert found == pytest.approx(wanted, rel=1e-8)
    limited = clients_lambda_max(module, clients, double=True, max_samples=5)
    assert len(limited) == 3
    halves = [clients_lambda_max(module, clients, double=True, tolerance=1e-10, rank=r, world_size=2) for r in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == pytest.approx(wanted, rel=1e-8)


def test_a_client_whose_loss_is_not_finite_stands_alone():
    module, x, y, _ = case("mlp")
    bad = x.clone()
    bad[3] = float("inf")
    found = clients_lambda_max(module, [ArrayDataset(x, y), ArrayDataset(bad, y)], double=True)
    assert found[0] > 0
    assert math.isnan(found[1])


def result() -> HessianResult:
    return measure_hessian(operator("mlp"), top_k=2, density=True, layers=layer_blocks(case("mlp")[0]))


def test_metrics_have_the_documented_names():
    assert set(result().metrics()) == {
        "hessian/lambda_max",
        "hessian/lambda_2",
        "hessian/lambda_min",
        "hessian/lambda_max_residual",
        "hessian/lambda_2_residual",
        "hessian/lambda_min_residual",
        "hessian/trace",
        "hessian/trace_error",
        "hessian/loss",
        "hessian/gradient_norm",
        "hessian/sharpness",
        "hessian/layer/net.0/lambda_max",
        "hessian/layer/net.2/lambda_max",
        "hessian/layer/net.4/lambda_max",
        "time/hessian_s",
    }
    with_clients = HessianResult(1.0, 0.1, 0.0, 0.05, [2.0], [0.0], -1.0, 0.0, clients={0: 1.0, 4: 3.0})
    assert with_clients.metrics()["hessian/clients/lambda_max_mean"] == 2
    assert with_clients.metrics()["hessian/clients/lambda_max_max"] == 3
    with_clients.clients[7] = math.nan
    assert math.isnan(with_clients.metrics()["hessian/clients/lambda_max_max"])


def test_a_result_is_saved_without_pickle(tmp_path):
    found = result()
    found.save(tmp_path / "deep" / "hessian.npz")
    with np.load(tmp_path / "deep" / "hessian.npz", allow_pickle=False) as saved:
        assert saved["eigenvalues"].tolist() == found.eigenvalues
        assert saved["layer_names"].tolist() == ["net.0", "net.2", "net.4"]
        assert saved["layer_lambda_max"].tolist() == list(found.layers.values())
        assert saved["trace"] == found.trace.value
        table = list(zip(saved["density_eigenvalue"].tolist(), saved["density"].tolist(), strict=True))
        assert table == found.density_table()
        assert saved["density_nodes"].shape == saved["density_weights"].shape


def test_the_summary_says_everything():
    text = result().summary()
    for part in ("30 samples", "λ_1", "λ_2", "λ_min", "residual", "trace", "±", "sharpness", "layer net.4", "seconds"):
        assert part in text
    assert HessianResult(1.0, 0.1, 0.0, 0.05, [2.0], [1.0], -1.0, 0.0, converged=False).summary().endswith("residuals.")
    lines = (
        HessianResult(1.0, 0.1, 0.0, 0.05, [2.0], [1.0], -1.0, 0.0, clients={0: 1.0, 4: math.nan})
        .summary()
        .splitlines()
    )
    assert [line.split()[-1] for line in lines if "client" in line] == ["nan", "nan"]


def test_what_is_out_of_range_is_refused():
    with pytest.raises(ValueError, match="`rho`"):
        measure_hessian(operator("mlp"), rho=0.0)


def _process(rank: int, path: str, queue: "multiprocessing.Queue[object]") -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)

    def total(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    queue.put((rank, _shared(rank, 2, total)))
    dist.destroy_process_group()


def _shared(rank, world_size, reduce):
    torch.manual_seed(5)
    module = Task(mlp()).double()
    data = TensorDataset(torch.randn(25, 6), torch.arange(25) % 3)
    options = {"double": True, "batch_size": 4, "rank": rank, "world_size": world_size, "reduce": reduce}
    found = measure_hessian(
        hessian_operator(module, data, **options), top_k=2, tolerance=1e-10, density=True, layers=layer_blocks(module)
    )
    metrics = {name: value for name, value in found.metrics().items() if not name.startswith("time/")}
    return metrics, found.samples, found.density.nodes.tolist()


@pytest.mark.slow
def test_two_processes_share_the_data_and_give_the_same_figures(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_process, args=(rank, str(tmp_path / "store"), queue)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    queue.close()
    assert found[0] == found[1]  # to the bit
    metrics, samples, nodes = _shared(0, 1, None)
    assert samples == found[0][1] == 25
    assert found[0][0] == pytest.approx(metrics, rel=1e-8)
    assert len(nodes) == len(found[0][2])


class Weighted(Task):
    """Cross-entropy with class weights, or with labels that are ignored, which says what it divides by."""

    def __init__(self, net, weight=None, ignore_index=-100):
        super().__init__(net)
        self.weight, self.ignore_index = weight, ignore_index

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y, self.weight, ignore_index=self.ignore_index)

    def loss_denominator(self, batch):
        kept = batch[1] != self.ignore_index
        return kept.sum() if self.weight is None else self.weight[batch[1][kept]].sum()


class Silent(Weighted):
    """The same without a word about it."""

    loss_denominator = None


LOSSES = {
    "class weights": {"weight": torch.tensor([0.2, 5.0, 1.0], dtype=torch.float64)},
    "ignore_index": {"ignore_index": 1},
    "both": {"weight": torch.tensor([0.2, 5.0, 1.0], dtype=torch.float64), "ignore_index": 2},
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_divides_by_something_else_than_samples_does_not_depend_on_the_batches(name):
    """Against the dense Hessian of the loss of all data at once; sorted labels make whole batches of ignored ones."""
    net, x, y, _ = case("mlp")[0].net, *case("mlp")[1:]
    order = y.argsort()
    module, batch = Weighted(copy.deepcopy(net), **LOSSES[name]), (x[order], y[order])
    reference = dense_hessian(net, *batch, **LOSSES[name])
    largest = torch.linalg.eigvalsh(reference)[-1].item()
    whole = module.training_step(batch, 0).item()
    for size in (1, 4, 7, 30):
        op = hessian_operator(module, TensorDataset(*batch), batch_size=size, double=True)
        torch.testing.assert_close(op.matmat(torch.eye(op.size).double()), reference, rtol=1e-9, atol=1e-13)
        result = measure_hessian(op, trace=False, density=False, tolerance=1e-8)
        assert result.eigenvalues[0] == pytest.approx(largest, rel=1e-6)
        assert result.loss == pytest.approx(whole, rel=1e-12)
        assert result.samples == len(y)
    if name == "class weights":
        silent = Silent(copy.deepcopy(net), **LOSSES[name])
        op = hessian_operator(silent, TensorDataset(*batch), batch_size=4, double=True)
        assert abs(op.loss_and_gradient()[0] - whole) > 0.01


def test_the_classifier_says_what_its_loss_divides_by():
    net, x, y, _ = case("mlp")[0].net, *case("mlp")[1:]
    y = y.clone()
    y[::3] = -100
    model = Classifier(copy.deepcopy(net), num_classes=3, label_smoothing=0.1).double()
    losses = [
        hessian_operator(model, TensorDataset(x, y), batch_size=s, double=True).loss_and_gradient()[0]
        for s in (1, 7, 30)
    ]
    assert losses == pytest.approx([F.cross_entropy(model.net(x), y, label_smoothing=0.1).item()] * 3, rel=1e-12)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_loss_that_divides_by_nothing_is_refused(value):
    module = Weighted(case("mlp")[0].net)
    module.loss_denominator = lambda batch: value
    with pytest.raises(ValueError, match="divides by must be positive in sum, found"):
        hessian_operator(module, TensorDataset(*case("mlp")[1:3]), batch_size=10, double=True)

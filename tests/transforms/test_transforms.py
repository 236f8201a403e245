"""What a message goes through before the server receives it."""

import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight import algorithms
from fedlight.algorithms import SCAFFOLD, FedAvg, FedDC, FedDyn, FedSMOO
from fedlight.run.loggers import read_metrics
from fedlight.server.state import num_bytes
from fedlight.transforms import ClipUpdate, Quantize, TopK, Transform, base
from fedlight.transforms.base import check_chain
from tests.helpers.tiny import Clients, Regression, quiet_trainer, seeded, weights

# What the perturbation of FedSMOO sends is no update; that is refused, see below. Others need classes, or an optimizer.
OTHERS = ("Message", "Algorithm", "FedSMOO", "FedNTD", "FedAdamW", "FedMuon")
NAMES = [name for name in algorithms.__all__ if name not in OTHERS]


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def sent(transforms, update, own=None, seed=0):
    """An update after a chain, the bytes that crossed, and what the client keeps."""
    zero, rng = torch.zeros_like(update), torch.Generator().manual_seed(seed)
    packed, kept = base.pack(transforms, {"params": zero}, {"params": update}, own or {}, rng)
    message = base.unpack(transforms, {"params": zero}, packed)
    return message["params"], num_bytes(packed.tensors), kept


def test_a_long_update_is_shortened_and_a_short_one_is_not():
    clipped, size, kept = sent([ClipUpdate(norm=2.5)], vector(3.0, 4.0))
    torch.testing.assert_close(clipped, vector(1.5, 2.0))
    assert (size, kept) == (16, {})
    assert torch.equal(sent([ClipUpdate(norm=5.0)], vector(3.0, 4.0))[0], vector(3.0, 4.0))
    assert torch.equal(sent([ClipUpdate()], vector(0.0, 0.0))[0], vector(0.0, 0.0))


def test_top_k_sends_the_largest_and_remembers_the_rest():
    """Of (1, −4, 2, 3) half is sent: −4 and 3. The rest (1, 0, 2, 0) and (1, 1, 1, 1) are (2, 1, 3, 1)."""
    first, size, kept = sent([TopK(0.5)], vector(1.0, -4.0, 2.0, 3.0))
    assert torch.equal(first, vector(0.0, -4.0, 0.0, 3.0))
    assert size == 2 * (8 + 4)
    (error,) = kept.values()
    assert torch.equal(error, vector(1.0, 0.0, 2.0, 0.0))
    second, _, kept = sent([TopK(0.5)], vector(1.0, 1.0, 1.0, 1.0), kept)
    assert torch.equal(second, vector(2.0, 0.0, 3.0, 0.0))
    assert torch.equal(next(iter(kept.values())), vector(0.0, 1.0, 0.0, 1.0))


def test_top_k_loses_nothing_over_the_rounds():
    updates = seeded(8, 50, dtype=torch.float64)
    total, kept = torch.zeros(50, dtype=torch.float64), {}
    for update in updates:
        arrived, _, kept = sent([TopK(0.1)], update, kept)
        assert int((arrived != 0).sum()) == 5
        total += arrived
    torch.testing.assert_close(total + next(iter(kept.values())), updates.sum(0))
    assert int((sent([TopK(1e-9)], updates[0])[0] != 0).sum()) == 1  # at least one entry
    assert torch.equal(sent([TopK(1.0)], updates[0])[0], updates[0])


@pytest.mark.parametrize("bits", [1, 2, 3, 7, 8, 11, 16])
def test_quantized_entries_lie_on_a_grid_next_to_what_they_were(bits):
    update = seeded(1001)
    arrived, size, kept = sent([Quantize(bits)], update)
    assert size == math.ceil(1001 * bits / 8) + 8
    assert kept == {}
    step = (update.max() - update.min()) / (2**bits - 1)
    assert float((arrived - update).abs().max()) <= float(step) * 1.001
    level = (arrived - update.min()) / step
    torch.testing.assert_close(level, level.round(), rtol=0, atol=2e-2)
    assert not torch.equal(arrived, sent([Quantize(bits)], update, seed=1)[0])
    assert torch.equal(arrived, sent([Quantize(bits)], update)[0])


def test_quantization_is_right_on_average():
    update = seeded(200)
    mean = torch.stack([sent([Quantize(2)], update, seed=i)[0] for i in range(400)]).double().mean(0)
    step = float(update.max() - update.min()) / 3
    # The variance of one draw is at most step²/4.
    assert float((mean - update).abs().max()) < 5 * step / 2 / math.sqrt(400)


@pytest.mark.parametrize("value", [0.0, -3.5])
def test_equal_entries_are_quantized_exactly(value):
    update = torch.full((9,), value)
    assert torch.equal(sent([Quantize(4)], update)[0], update)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_levels_are_not_rounded_to_half_precision(dtype):
    """There 200.3 is 200, and a level and its part of the way one above."""
    update = (2 * torch.rand(1000, generator=torch.Generator().manual_seed(1)) - 1).to(dtype)
    found = [sent([Quantize(12)], update, seed=seed)[0] for seed in range(30)]
    assert {value.dtype for value in found} == {dtype}
    error = (torch.stack(found).double() - update.double()).mean(0)
    assert float(error.abs().max()) <= 2 / (2**12 - 1) + float(torch.finfo(dtype).eps) / 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("chain", [[ClipUpdate()], [TopK(0.5)], [Quantize(8)]])
def test_what_is_not_finite_arrives_as_such(chain, bad):
    assert not sent(chain, torch.tensor([1.0, bad, 2.0]))[0].isfinite().all()


def test_a_chain_of_all_three():
    update = seeded(400)
    arrived, size, kept = sent([ClipUpdate(norm=1.0), TopK(0.1), Quantize(4)], update)
    assert size == 40 * 4 // 8 + 8 + 40 * 4  # levels, grid, places
    assert int((arrived != 0).sum()) <= 40
    assert float(arrived.norm()) == pytest.approx(float((update / update.norm()).topk(40).values.norm()), rel=1)
    assert list(kept) == ["params/1/error"]


@pytest.mark.filterwarnings("ignore:algorithm. FedBN keeps")
@pytest.mark.parametrize("name", NAMES)
def test_the_identity_gives_the_same_bits(tmp_path, name):
    def run(**settings):
        model, trainer = Regression(), quiet_trainer(tmp_path, algorithm=getattr(algorithms, name)(), **settings)
        trainer.fit(model, Clients())
        return weights(model), read_metrics(trainer.run_dir / "metrics.csv")

    plain, rows = run()
    same, same_rows = run(transforms=[Transform()])
    assert torch.equal(plain, same)
    timeless = [[{k: v for k, v in row.items() if not k.startswith("time/")} for row in r] for r in (rows, same_rows)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("algorithm", [FedAvg(), FedDyn(0.1), SCAFFOLD(), FedDC(0.1)])
def test_compressed_training_counts_its_bytes_and_resumes_to_the_same_bits(tmp_path, algorithm):
    chain, sends = [TopK(0.5), Quantize(8)], 2 if algorithm.needs_lr else 1
    whole = Regression()
    trainer = quiet_trainer(tmp_path, algorithm=algorithm, transforms=chain, max_rounds=6, clients_per_round=2)
    trainer.fit(whole, Clients())
    row = read_metrics(trainer.run_dir / "metrics.csv")[0]
    assert row["comm/up_mb"] * 1e6 == pytest.approx(2 * sends * (2 + 8 + 2 * 4))  # two of four entries
    assert row["comm/down_mb"] * 1e6 == pytest.approx(2 * sends * 16)
    half = Regression()
    settings = {"algorithm": algorithm, "transforms": chain, "clients_per_round": 2, "name": "half"}
    first = quiet_trainer(tmp_path, max_rounds=3, **settings)
    first.fit(half, Clients())
    resumed = Regression()
    quiet_trainer(tmp_path, max_rounds=6, **settings).fit(resumed, Clients(), ckpt_path="last")
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ([TopK(), ClipUpdate()], r"Write \['ClipUpdate', 'TopK'\]"),
        ([Quantize(), TopK()], r"Write \['TopK', 'Quantize'\]"),
        (["TopK"], "is no Transform"),
    ],
)
def test_an_order_that_makes_no_sense_names_the_right_one(chain, message):
    with pytest.raises(MisconfigurationException, match=message):
        check_chain(chain)


def test_settings_that_make_no_sense():
    for fraction in (0, 1.5, -1, math.nan):
        with pytest.raises(ValueError, match=r"transforms\.fraction"):
            TopK(fraction)
    for bits in (0, 17, 2.5, True):
        with pytest.raises(MisconfigurationException, match=r"transforms\.bits"):
            Quantize(bits)
    with pytest.raises(ValueError, match=r"transforms\.norm"):
        ClipUpdate(0)


@pytest.mark.parametrize(
    ("algorithm", "chain", "message"),
    [
        (SCAFFOLD(), [ClipUpdate()], "ClipUpdate is for a model's update, and SCAFFOLD sends control_change as well"),
        (FedSMOO(), [TopK()], "TopK works on updates, and the perturbation of FedSMOO sends dual"),
    ],
)
def test_a_message_that_a_transform_cannot_handle_is_refused_before_training(tmp_path, algorithm, chain, message):
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(tmp_path, algorithm=algorithm, transforms=chain).fit(Regression(), Clients())


class Scalar(FedAvg):
    """Sends its largest weight as well."""

    def client_update(self, received, client, result):
        return client, {"params": result.params, "largest": result.params.max()}


class Halved(Transform):
    """Hands on half of the entries, and does not put the others back."""

    def encode(self, vector, own, rng):
        return vector[::2], {}, own


@pytest.mark.parametrize(
    ("algorithm", "chain", "message"),
    [
        (Scalar(), [Quantize()], r"\['Quantize'\] cannot take largest of Scalar, which is torch.float32 \[\]"),
        (FedAvg(), [Halved()], r"\['Halved'\] cannot take params .*ValueError: params, \[4\], arrives as \[2\]"),
    ],
)
def test_a_tensor_that_a_chain_fails_on_is_found_before_training(tmp_path, algorithm, chain, message):
    trainer = quiet_trainer(tmp_path, algorithm=algorithm, transforms=chain)
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(Regression(), Clients())
    assert not list(tmp_path.glob("default/version_*"))


class FailsLater(Transform):
    """Fails where an update is not zero."""

    def encode(self, vector, own, rng):
        if vector.any():
            raise RuntimeError("a mistake of one's own")
        return vector, {}, own


def test_a_transform_that_fails_in_a_round_names_round_and_client(tmp_path):
    with pytest.raises(RuntimeError, match="of one's own") as caught:
        quiet_trainer(tmp_path, transforms=FailsLater()).fit(Regression(), Clients())
    assert caught.value.__notes__[0].startswith("This happened in round 1, client ")

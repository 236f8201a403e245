"""Dropout of clients side by side comes from each client's own seed."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F

from fedlight.engines.vmap import functions
from fedlight.engines.vmap.functions import ClientDropout
from tests.engines.cases import Images, Net
from tests.helpers.tiny import quiet_trainer

SEED, STEP = torch.tensor(1234567), torch.tensor(3)


def masks(seed=SEED, step=STEP, calls=2, shape=(100, 100), p=0.3, layer=None):
    with ClientDropout(seed, step):
        return [(layer or F.dropout)(torch.ones(shape), p) for _ in range(calls)]


def test_the_numbers_are_splitmix64s():
    # Rosetta Code, "Pseudo-random numbers/Splitmix64": the first four for the seed 1234567.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    found = functions._mixed(SEED + torch.arange(1, 6) * functions._GOLDEN)
    assert [n % 2**64 for n in found.tolist()] == expected


def test_as_many_are_kept_as_shall_be_and_masks_are_unlike():
    one, two = masks()
    assert one.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    others = [two, masks(step=torch.tensor(4))[0], masks(seed=SEED + 1)[0], one.roll(1, 0), one.roll(1, 1), one.T]
    assert float((one > 0).float().mean()) == pytest.approx(0.7, abs=0.02)  # four standard deviations
    for other in others:  # independent: both are kept in 0.49 of the places
        assert float(((one > 0) & (other > 0)).float().mean()) == pytest.approx(0.49, abs=0.02)
    assert torch.equal(one, masks()[0])


def test_modules_edges_and_errors():
    module = nn.Dropout(0.3)
    assert torch.equal(masks(layer=lambda x, p: module(x))[1], masks()[1])
    assert torch.equal(masks(layer=lambda x, p: torch.dropout(x, p, train=True))[1], masks()[1])
    assert torch.equal(masks(layer=lambda x, p: F.dropout(x, p, inplace=True))[1], masks()[1])
    module.eval()
    assert torch.equal(masks(layer=lambda x, p: module(x))[0], torch.ones(100, 100))
    assert not masks(p=1.0)[0].any()
    with pytest.raises(ValueError, match="between 0 and 1"):
        masks(p=1.5)


def test_rows_have_their_own_masks_wherever_they_are():
    def step(seed, x):
        with ClientDropout(seed, STEP):
            return grad(lambda x: F.dropout(x, 0.3).sum())(x)

    seeds, x = torch.tensor([5, 6, 5]), torch.ones(3, 40)
    rows = vmap(step)(seeds, x)
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(vmap(step)(seeds[1:2], x[:1])[0], rows[1])
    assert torch.equal(step(seeds[1], x[0]), rows[1])


class FixedNoise(Net):
    """Adds the same noise to every batch."""

    def training_step(self, batch, batch_idx):
        noise = torch.randn(batch[0].shape, generator=torch.Generator().manual_seed(1), dtype=batch[0].dtype)
        return super().training_step((batch[0] + noise, batch[1]), batch_idx)


def test_a_generator_of_the_steps_own_is_refused_as_clients_would_draw_otherwise(tmp_path):
    with pytest.raises(MisconfigurationException, match="vmap: training_step of FixedNoise draws .* a generator"):
        quiet_trainer(tmp_path, engine="vmap", max_rounds=1).fit(FixedNoise(), Images())

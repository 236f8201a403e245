"""Data read sample by sample: what it draws depends on seed, round, client, epoch and batch, not on who reads it."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, default_collate

from fedlight.analysis.batches import analysis_batches
from fedlight.data.reading import read_batches
from fedlight.run.loggers import read_metrics
from fedlight.seeding import preserved_global_rng, seed_global_rng
from tests.helpers.processes import DrawingClients, Measured
from tests.helpers.tiny import Drawing, quiet_trainer, seeded, weights

BATCHES = [[3, 1], [0, 5, 2], [4]]
SEEDS = [3, 5, 7]


def collate(samples):
    """Draws, too: as those do that mask words."""
    x, y = default_collate(samples)
    return x * (torch.rand(()) + random.random() + np.random.rand()), y


def drawn(**settings):
    settings = {"dataset": Drawing(seeded(6, 3), seeded(6)), "batches": BATCHES, "seeds": SEEDS, **settings}
    return list(read_batches(collate_fn=collate, **settings))


def equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) for p, q in zip(one, other, strict=True) for a, b in zip(p, q, strict=True)
    )


def test_workers_draw_what_the_program_itself_draws():
    expected = drawn()
    assert [len(x) for x, _ in expected] == [2, 3, 1]
    assert equal(drawn(num_workers=2), expected)
    assert equal(drawn(dataset=Subset(Drawing(seeded(6, 3), seeded(6)), range(6))), expected)
    assert not equal(drawn(seeds=[3, 5, 8]), expected)
    # A part of the batches, as a process of several reads it.
    assert equal(drawn(batches=BATCHES[1:], seeds=SEEDS[1:]), expected[1:])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_programs_own_draws_go_on_as_if_nothing_had_been_read(num_workers):
    def numbers():
        return random.random(), np.random.rand(), float(torch.rand(()))

    with preserved_global_rng():
        seed_global_rng(1)
        expected = [numbers() for _ in range(4)]
        seed_global_rng(1)
        found = [numbers()]
        for _ in read_batches(Drawing(seeded(6, 3), seeded(6)), BATCHES, SEEDS, num_workers):
            found.append(numbers())
    assert found == expected


def test_batches_are_those_of_a_stock_loader():
    class Words(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return {"text": "abcdef"[index], "array": np.float32([index]), "number": index, "pair": (1.5, index)}

    expected = list(torch.utils.data.DataLoader(Words(), batch_sampler=BATCHES))
    for num_workers in (0, 2):
        found = list(read_batches(Words(), BATCHES, SEEDS, num_workers))
        assert repr(found) == repr(expected)  # types, too


def run(tmp_path, resume=None, **settings):
    def data():
        return DrawingClients((6, 12, 8), num_workers=settings.get("workers", 0))

    options = {"seed": settings.get("seed", 0), "max_rounds": 3, "local_epochs": 2, "name": str(settings)}
    if resume is not None:
        quiet_trainer(tmp_path, **options | {"max_rounds": resume}).fit(Measured(), data())
    module, trainer = Measured(), quiet_trainer(tmp_path, **options)
    trainer.fit(module, data(), ckpt_path=None if resume is None else "last")
    rows = read_metrics(trainer.run_dir / "metrics.csv")
    return weights(module), [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


@pytest.mark.slow
def test_a_run_has_the_same_bits_with_and_without_workers_and_across_a_resume(tmp_path):
    expected, rows = run(tmp_path)
    for settings in ({"workers": 2}, {"resume": 2}):
        found, found_rows = run(tmp_path, **settings)
        assert torch.equal(found, expected)
        assert found_rows == rows
    assert not torch.equal(run(tmp_path, seed=1)[0], expected)


def test_an_analysis_draws_the_same_every_time():
    data, device = Drawing(seeded(6, 3), seeded(6)), torch.device("cpu")
    whole = analysis_batches(data, device=device, batch_size=2)
    again = analysis_batches(data, device=device, batch_size=2, rank=1, world_size=2)
    assert len(whole) == 3
    assert equal([whole[1]], [again[0]])

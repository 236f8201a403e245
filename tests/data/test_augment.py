"""BatchTransform against an obvious twin that treats one image after the other."""

import copy
import pickle

import pytest
import torch

from fedlight.data import BatchTransform

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def one_image(image, mean, std, padding, flip, top, left):
    """Normalise, pad by zeros, cut a window, mirror: pixel by pixel, in float64."""
    channels, height, width = image.shape
    out = torch.zeros(channels, height, width, dtype=torch.float64)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                source_i = i + top - padding
                source_j = (width - 1 - j if flip else j) + left - padding
                if 0 <= source_i < height and 0 <= source_j < width:
                    out[c, i, j] = (image[c, source_i, source_j].item() / 255 - mean[c]) / std[c]
    return out


@pytest.mark.parametrize(("height", "width", "padding"), [(8, 8, 2), (5, 7, 4), (4, 6, 1)])
def test_equals_the_twin_that_treats_one_image_at_a_time(height, width, padding):
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 3, height, width), dtype=torch.uint8, generator=rng)
    transform = BatchTransform(MEAN, STD, flip=0.5, crop_padding=padding)
    draws = transform.draw(24, rng)
    got = transform(images, draws)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    for n in range(24):
        expected = one_image(images[n], MEAN, STD, padding, *(draws[k][n].item() for k in ("flip", "top", "left")))
        torch.testing.assert_close(got[n].double(), expected, rtol=1e-5, atol=1e-6)


def test_without_draws_it_normalises_only():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    got = BatchTransform([0.2], [0.4], flip=0.5, crop_padding=4)(images)
    torch.testing.assert_close(got, torch.tensor([-0.5, 0.0, 2.0]).view(1, 1, 1, 3))


def test_floating_point_images_are_taken_to_be_in_zero_to_one():
    images = torch.tensor([0.0, 0.2, 1.0], dtype=torch.float64).view(1, 1, 1, 3)
    got = BatchTransform([0.2], [0.4])(images)
    torch.testing.assert_close(got, torch.tensor([-0.5, 0.0, 2.0]).view(1, 1, 1, 3))


def test_the_border_is_zero_after_normalisation():
    images = torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)
    draws = {"top": torch.tensor([0]), "left": torch.tensor([0])}
    got = BatchTransform([0.5], [0.5], crop_padding=2)(images, draws)
    assert got[0, 0].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_a_flip_mirrors_columns_only():
    images = torch.arange(6, dtype=torch.uint8).view(1, 1, 2, 3)
    plain = BatchTransform([0.0], [1.0], flip=0.5)
    got = plain(images, {"flip": torch.tensor([True])}) * 255
    assert got[0, 0].round().tolist() == [[2, 1, 0], [5, 4, 3]]


def test_draws_have_the_stated_probabilities():
    transform = BatchTransform(MEAN, STD, flip=0.25, crop_padding=4, crop_probability=0.5)
    n = 40_000
    draws = transform.draw(n, torch.Generator().manual_seed(1))
    assert draws["flip"].float().mean().item() == pytest.approx(0.25, abs=0.01)
    # Half the images keep offset 4 (the identity); the others are uniform over 0..8.
    for name in ("top", "left"):
        frequency = torch.bincount(draws[name], minlength=9) / n
        expected = torch.full((9,), 0.5 / 9)
        expected[4] += 0.5
        assert len(frequency) == 9
        torch.testing.assert_close(frequency, expected, rtol=0, atol=0.01)
    identity = (draws["top"] == 4) & (draws["left"] == 4)
    assert identity.float().mean().item() == pytest.approx(0.5 + 0.5 / 81, abs=0.01)  # one decision for both


def test_draws_depend_on_the_generator_only():
    transform = BatchTransform(MEAN, STD, flip=0.5, crop_padding=4)
    before = torch.get_rng_state()
    a, b = (transform.draw(9, torch.Generator().manual_seed(3)) for _ in range(2))
    assert a.keys() == b.keys() == {"flip", "top", "left"}
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({}, set()),
        ({"flip": 0.5}, {"flip"}),
        ({"crop_padding": 2}, {"top", "left"}),
        ({"crop_padding": 2, "crop_probability": 0.0}, set()),
    ],
)
def test_only_what_is_random_is_drawn(arguments, names):
    transform = BatchTransform(MEAN, STD, **arguments)
    assert set(transform.draw(3, torch.Generator())) == names


def test_works_under_vmap_and_compile():
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 6, 3, 8, 8), dtype=torch.uint8, generator=rng)
    transform = BatchTransform(MEAN, STD, flip=0.5, crop_padding=2)
    draws = {k: v.view(4, 6) for k, v in transform.draw(24, rng).items()}
    together = torch.vmap(transform)(images, draws)
    for k in range(4):
        alone = transform(images[k], {name: v[k] for name, v in draws.items()})
        assert torch.equal(together[k], alone)


def test_survives_copy_and_pickle():
    transform = BatchTransform(MEAN, STD, flip=0.5, crop_padding=2)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for twin in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform)), transform.to("cpu")):
        assert torch.equal(twin(images), transform(images))
        assert repr(twin) == repr(transform)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": [0.5], "std": [0.0]}, r"data\.normalize"),
        ({"mean": [0.5, 0.5], "std": [1.0]}, r"data\.normalize"),
        ({"mean": [0.5], "std": [1.0], "flip": 1.5}, "flip"),
        ({"mean": [0.5], "std": [1.0], "crop_padding": -1}, r"data\.crop_padding"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchTransform(**arguments)

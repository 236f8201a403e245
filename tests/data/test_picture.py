"""The partition as a picture and as a table."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fedlight.data import partition_csv, save_partition_picture

COUNTS = torch.tensor([[3, 0], [10, 4], [0, 1]])


def picture(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).view(-1, 3)


@pytest.mark.parametrize("shape", [(3, 2), (20, 10), (1, 1), (5, 1), (100, 100), (300, 200), (2500, 3)])
def test_a_picture_of_any_size_in_shades_of_grey(tmp_path, shape):
    counts = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0))
    save_partition_picture(counts, tmp_path / "partition.png")
    pixels = picture(tmp_path / "partition.png")
    assert (pixels == pixels[:, :1]).all()  # grey
    assert 0.02 < (pixels[:, 0] < 255).float().mean() < 0.9  # neither empty nor full
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_more_samples_are_darker(tmp_path):
    for name, counts in (("few", 1), ("many", 40)):
        table = torch.full((60, 30), counts)
        table[0, 0] = 40  # the same scale in both
        save_partition_picture(table, tmp_path / f"{name}.png")
    few, many = (picture(tmp_path / f"{name}.png").float().mean() for name in ("few", "many"))
    assert many < few


@pytest.mark.parametrize("suffix", [".pdf", ".svg"])
def test_other_formats(tmp_path, suffix):
    save_partition_picture(COUNTS, tmp_path / f"partition{suffix}", ["cat", "dog"])
    assert (tmp_path / f"partition{suffix}").stat().st_size > 1000


def test_a_svg_names_what_it_shows(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        save_partition_picture(COUNTS, tmp_path / "partition.svg", ["cat", "dog"])
    text = (tmp_path / "partition.svg").read_text()
    for word in ("cat", "dog", "client", "class", "samples", "3 clients, 18 samples", "1 to 14 (median 3) per client"):
        assert word in text


def test_csv_holds_every_client():
    assert partition_csv(COUNTS, ['a "cat"', "dog"]) == (
        'client,samples,classes,"a ""cat""",dog\n0,3,1,3,0\n1,14,2,10,4\n2,1,1,0,1\ntotal,18,2,13,5\n'
    )
    assert partition_csv(COUNTS).splitlines()[0] == "client,samples,classes,0,1"

"""Image files of every kind: what their pixels become, and what is refused by the file's name."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from fedlight.data.pixels import read_images

GREY = np.array([[0, 1000], [30000, 65535]], np.uint16)
TRUE = torch.tensor([[[0, 1000], [30000, 65535]]]) / 65535


def tiff(path, pixels, order="<"):
    """An uncompressed grey TIFF of any type of number, in either byte order."""
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    form, bits = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind], pixels.dtype.itemsize * 8
    short = {
        256: pixels.shape[1],
        257: pixels.shape[0],
        258: bits,
        259: 1,
        262: 1,
        277: 1,
        278: pixels.shape[0],
        339: form,
    }
    entries = [(tag, struct.pack(order + "HIHH", 3, 1, value, 0)) for tag, value in short.items()]
    entries += [(273, struct.pack(order + "HII", 4, 1, 8)), (279, struct.pack(order + "HII", 4, 1, len(data)))]
    table = b"".join(struct.pack(order + "H", tag) + rest for tag, rest in sorted(entries))
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data))
    path.write_bytes(head + data + struct.pack(order + "H", len(entries)) + table + bytes(4))
    return path


def saved(image, path):
    image.save(path)
    return path


def sixteen(kind, folder):
    """The same 16-bit picture in one of the ways in which it is kept."""
    if kind == "png":
        return saved(Image.fromarray(GREY), folder / "a.png")
    if kind == "pgm":
        (folder / "a.pgm").write_bytes(b"P5\n2 2\n65535\n" + GREY.astype(">u2").tobytes())
        return folder / "a.pgm"
    order, dtype = (
        (">", np.uint16) if kind == "big-endian tiff" else ("<", {"tiff": np.uint16, "mode I": np.int32}[kind])
    )
    return tiff(folder / "a.tif", GREY.astype(dtype), order)


@pytest.mark.parametrize("kind", ["png", "pgm", "tiff", "big-endian tiff", "mode I"])
def test_sixteen_bits_are_kept_and_scaled_by_their_range(tmp_path, kind):
    x = read_images([sixteen(kind, tmp_path)])
    assert x.dtype == torch.float32
    assert torch.allclose(x, TRUE[None], atol=0, rtol=1e-6)
    assert torch.equal((x * 65535).round()[0, 0].int(), torch.from_numpy(GREY.astype(np.int32)))  # nothing is lost


def test_dark_pictures_of_sixteen_bits_stay_dark(tmp_path):
    paths = [
        saved(Image.fromarray(np.full((2, 2), value, np.uint16)), tmp_path / f"{value}.png") for value in (10, 255)
    ]
    assert torch.allclose(read_images(paths)[:, 0, 0, 0], torch.tensor([10, 255]) / 65535)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("values", "white"), [((0.0, 0.5), 1), ((0.0, 200.0), 255), ((3.0, 40000.0), 65535)])
def test_floating_point_pictures_have_the_least_white_that_holds_all_of_them(tmp_path, values, white, order):
    paths = [tiff(tmp_path / f"{v}.tif", np.full((2, 2), v, np.float32), order) for v in values]
    x = read_images(paths)
    assert torch.allclose(x[:, 0, 1, 1], torch.tensor(values) / white)
    assert torch.allclose(read_images(paths, 3)[:, 0, 1, 1], torch.tensor(values) / white)  # and resized


@pytest.mark.parametrize(("values", "white"), [((0, 255), 255), ((255, 4095), 65535)])
def test_integers_of_32_bits(tmp_path, values, white):
    paths = [tiff(tmp_path / f"{v}.tif", np.full((2, 2), v, np.int32)) for v in values]
    assert torch.allclose(read_images(paths)[:, 0, 0, 0], torch.tensor(values) / white)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.full((2, 2), -1, np.int32), "32-bit integer pixels from -1 to -1"),
        (np.full((2, 2), -1, np.int16), "pixels from -1 to -1"),
        (np.full((2, 2), 70000, np.int32), "32-bit integer pixels from 70000"),
        (np.full((2, 2), -0.5, np.float32), "floating-point pixels from -0.5"),
        (np.full((2, 2), 1.5, np.float32), "floating-point pixels from 1.5"),
        (np.full((2, 2), np.nan, np.float32), "floating-point pixels from nan"),
        (np.full((2, 2), np.inf, np.float32), "floating-point pixels from inf"),
        (np.full((2, 2), 0.5, np.float64), "is not a readable image"),
    ],
)
def test_what_has_no_known_white_is_refused_by_name(tmp_path, bad, message):
    good = tiff(tmp_path / "good.tif", np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match=f"`data.source`: .*bad.tif .*{message}|bad.tif {message}"):
        read_images([good, tiff(tmp_path / "bad.tif", bad)])


def modes(folder):
    """One picture in every mode with eight bits: black, red or grey, and white."""
    rgb = Image.new("RGB", (3, 1))
    rgb.putdata([(0, 0, 0), (200, 0, 0), (255, 255, 255)])
    grey = Image.new("L", (3, 1))
    grey.putdata([0, 100, 255])
    clear = rgb.quantize(8)
    clear.info["transparency"] = bytes([255, 255, 0])
    return {
        "RGB": rgb, "RGBA": rgb.convert("RGBA"), "P": rgb.quantize(8), "CMYK": rgb.convert("CMYK"), "PA": clear,
        "L": grey, "LA": grey.convert("LA"), "1": grey.convert("1"), "grey P": grey.convert("P"),
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "PA"])
def test_colour_images_of_every_mode(tmp_path, mode):
    image = modes(tmp_path)[mode]
    x = read_images([saved(image, tmp_path / f"a.{'tif' if mode == 'CMYK' else 'png'}")])
    assert x.dtype == torch.uint8
    assert x[0, :, 0].T.tolist() == [[0, 0, 0], [200, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize(("mode", "middle"), [("L", 100), ("LA", 100), ("grey P", 100), ("1", 0)])
def test_grey_images_keep_one_channel(tmp_path, mode, middle):
    x = read_images([saved(modes(tmp_path)[mode], tmp_path / "a.png")])
    assert x.dtype == torch.uint8
    assert x.tolist() == [[[[0, middle, 255]]]]


def test_one_coloured_file_makes_all_of_them_coloured(tmp_path):
    made = modes(tmp_path)
    grey = [saved(made["L"], tmp_path / f"{i}.png") for i in range(20)]
    deep = saved(Image.fromarray(np.full((1, 3), 65535, np.uint16)), tmp_path / "deep.png")
    assert read_images(grey).shape == (20, 1, 1, 3)
    x = read_images([*grey, saved(made["RGB"], tmp_path / "rgb.png")])
    assert x[0, :, 0, 1].tolist() == [100, 100, 100]
    assert x[20, :, 0, 1].tolist() == [200, 0, 0]
    x = read_images([grey[0], deep, tmp_path / "rgb.png"])
    assert torch.allclose(x[:, :, 0, 1], torch.tensor([[100] * 3, [255] * 3, [200, 0, 0]]) / 255)


@pytest.mark.parametrize("end", ["png", "jpg", "tif"])
def test_photographs_are_turned_upright(tmp_path, end):
    """Orientation 6: the right side of what is stored is the bottom."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.repeat([0, 0, 255, 255], 8).astype(np.uint8).reshape(4, 8).repeat(2, 0).T.copy())
    stored.save(tmp_path / f"a.{end}", exif=exif, **({"quality": 100} if end == "jpg" else {}))
    x = read_images([tmp_path / f"a.{end}"])
    assert x.shape == (1, 1, 8, 8)
    assert torch.equal(x[0, 0] > 127, (torch.arange(8) > 3)[:, None].expand(8, 8))


def test_gif(tmp_path):
    image = Image.fromarray(np.array([[[0, 0, 0], [200, 0, 0], [255, 255, 255]]], np.uint8))
    assert read_images([saved(image, tmp_path / "a.gif")])[0, :, 0].T.tolist() == [[0] * 3, [200, 0, 0], [255] * 3]
    image.save(tmp_path / "b.gif", save_all=True, append_images=[image.rotate(180)])
    with pytest.raises(ValueError, match="b.gif .* holds 2 images"):
        read_images([tmp_path / "b.gif"])


def test_what_cannot_be_converted_is_refused_by_name(tmp_path):
    ink = Image.new("RGBA", (2, 2))
    ink.putpixel((0, 0), (0, 0, 0, 255))
    with pytest.raises(ValueError, match="ink.png .* differs in transparency alone"):
        read_images([saved(ink, tmp_path / "ink.png")])
    pages = [Image.new("L", (2, 2), i) for i in range(3)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match="stack.tif .* holds 3 images"):
        read_images([tmp_path / "stack.tif"])

"""Augmentation and normalisation of a whole batch of images at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlight.checks import check_number, check_whole


class BatchTransform:
    """Normalises a batch of images and, where random numbers are given, flips and crops each image on its own.

    With probability ``flip`` an image is mirrored; with probability ``crop_probability`` it is replaced by a window of
    its own size, at a random place of the image padded by ``crop_padding`` zeros on each side. The zeros are those of
    the *normalised* image, so the border has the mean colour. With ``flip=0.5`` and ``crop_padding=4`` this is the
    augmentation of "Minimizing Layerwise Activation Norm Improves Generalization in Federated Learning" (WACV 2024).

    Random numbers and arithmetic are apart: :meth:`draw` takes the numbers from a generator, on the CPU;
    :meth:`__call__` is nothing but tensor operations of static shape, so that it can be captured in a CUDA graph,
    compiled and run under ``torch.func.vmap``.

    Args:
        mean: mean of each channel, of pixels in [0, 1].
        std: standard deviation of each channel, of pixels in [0, 1].
        flip: probability of a horizontal flip.
        crop_padding: width of the border in pixels; 0 for no crop.
        crop_probability: probability of a random crop, where there is padding.

    Raises:
        ValueError: for a probability outside [0, 1], a negative padding or a ``std`` that is not positive.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        flip: float = 0.0,
        crop_padding: int = 0,
        crop_probability: float = 0.5,
    ) -> None:
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(f"`data.normalize` needs one mean and one positive std per channel, got {mean} and {std}.")
        check_whole("`data.crop_padding`", crop_padding, 0)
        self.flip, self.crop_padding = check_number("`flip`", flip, at_most=1), crop_padding
        self.crop_probability = check_number("`crop_probability`", crop_probability, at_most=1)
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        std_, mean_ = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (self.std, self.mean))
        # One multiplication and one addition: x/255 becomes (x/255 - mean)/std = x·scale + shift.
        self._shift = (-mean_ / std_).float()
        self._scale = (1 / std_).float()
        self._byte_scale = (1 / (255 * std_)).float()

    @property
    def crops(self) -> bool:
        """Whether images are cropped."""
        return self.crop_padding > 0 and self.crop_probability > 0

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The random numbers for ``n`` images, in order; empty where nothing is random.

        Returns:
            ``flip`` [n] bool: mirrored or not. ``top`` and ``left`` [n] int64: the place of the window in the padded
            image, between 0 and 2·padding; an image that is not cropped has the padding itself, which is the identity.
        """
        draws: dict[str, Tensor] = {}
        if self.flip > 0:
            draws["flip"] = torch.rand(n, generator=generator) < self.flip
        if self.crops:
            crop = torch.rand(n, generator=generator) < self.crop_probability
            for name in ("top", "left"):
                offset = torch.randint(0, 2 * self.crop_padding + 1, (n,), generator=generator)
                draws[name] = torch.where(crop, offset, self.crop_padding)
        return draws

    def __call__(self, images: Tensor, draws: dict[str, Tensor] | None = None) -> Tensor:
        """Augment and normalise.

        Args:
            images: ``[B, C, H, W]`` uint8 in [0, 255] or floating-point in [0, 1].
            draws: what :meth:`draw` gave for these images, on the device of the images; None: no augmentation.

        Returns:
            ``[B, C, H, W]`` float32, contiguous.
        """
        outside = None
        if draws:
            images, outside = self._window(images, draws)
        scale = self._scale if images.is_floating_point() else self._byte_scale
        normal = images.float() * scale + self._shift
        # Not torch.where: its scalar would be copied from the host, which a CUDA graph cannot repeat.
        return normal if outside is None else normal.masked_fill(outside, 0.0)

    def _window(self, images: Tensor, draws: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Each image through its window: pixels by index, and a mask ``[B, 1, H, W]`` of those outside the image."""
        (batch, channels, height, width), pad = images.shape, self.crop_padding
        rows, columns = (torch.arange(size, device=images.device).expand(batch, size) for size in (height, width))
        if "top" in draws:
            rows, columns = rows + (draws["top"] - pad)[:, None], columns + (draws["left"] - pad)[:, None]
        if "flip" in draws:
            columns = torch.where(draws["flip"][:, None], columns.flip(1), columns)
        outside = None
        if "top" in draws:
            beyond_rows, beyond_columns = (rows < 0) | (rows >= height), (columns < 0) | (columns >= width)
            outside = beyond_rows[:, None, :, None] | beyond_columns[:, None, None]
            rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        pixels = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, height * width)
        flat = images.flatten(2).gather(2, pixels.expand(batch, channels, height * width))
        return flat.view(batch, channels, height, width), outside

    def to(self, device: torch.device | str) -> "BatchTransform":
        """The same transform with its constants on a device."""
        if self._shift.device == torch.device(device):
            return self
        moved = object.__new__(BatchTransform)
        moved.__dict__.update({k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.__dict__.items()})
        return moved

    def __repr__(self) -> str:
        crop = f", crop_padding={self.crop_padding}, crop_probability={self.crop_probability}" if self.crops else ""
        return f"BatchTransform(mean={self.mean}, std={self.std}, flip={self.flip}{crop})"

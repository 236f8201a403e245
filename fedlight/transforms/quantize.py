"""Quantize."""

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fedlight.perturbations.base import State
from fedlight.transforms.base import Transform


class Quantize(Transform):
    """Send each entry with a few bits: one of 2^bits levels between the smallest and the largest entry.

    An entry between two levels goes to the upper one with a probability that is its part of the way, so its expectation
    is the entry itself (stochastic rounding).

    Args:
        bits: bits of an entry, from 1 to 16. The smallest entry and the distance of levels are sent beside them.

    Source: Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", NeurIPS 2017,
    section 3.1; the levels span the range of the entries as in Suresh et al., "Distributed Mean Estimation with Limited
    Communication", ICML 2017, section 2.2.
    """

    stage = 2

    def __init__(self, bits: int = 8) -> None:
        if type(bits) is not int or not 1 <= bits <= 16:
            raise MisconfigurationException(f"trainer.transforms.bits={bits!r} must be a whole number from 1 to 16.")
        self.bits = bits

    def encode(self, vector: Tensor, own: State, rng: torch.Generator) -> tuple[Tensor, State, State]:
        """The levels, packed into bytes, and beside them where they lie."""
        if vector.dtype.itemsize < 4:  # half precision rounds what lies between two of many levels
            vector = vector.float()
        low, high = vector.aminmax()
        step = (high - low) / (2**self.bits - 1)
        draws = torch.rand(vector.shape, generator=rng, dtype=vector.dtype).to(vector.device)
        # Where all entries are the same there is one level, and 0/0.
        position = torch.where(step > 0, (vector - low) / step, 0.0)
        level = torch.clamp((position + draws).floor(), 0, 2**self.bits - 1)
        # NaN and infinity must arrive as such: a message that holds them is found by the server.
        return self._packed(level.to(torch.int32)), {"grid": torch.stack([low, step])}, own

    def decode(self, vector: Tensor, beside: State, length: int) -> Tensor:
        """The values of the levels."""
        low, step = beside["grid"].unbind()
        return low + step * self._unpacked(vector, length).to(low.dtype)

    def _packed(self, level: Tensor) -> Tensor:
        bits = (level[:, None] >> torch.arange(self.bits, device=level.device)) & 1
        padded = torch.nn.functional.pad(bits.flatten(), (0, -bits.numel() % 8)).view(-1, 8)
        return (padded << torch.arange(8, device=level.device)).sum(1).to(torch.uint8)

    def _unpacked(self, packed: Tensor, length: int) -> Tensor:
        bits = (packed[:, None].int() >> torch.arange(8, device=packed.device)) & 1
        levels = bits.flatten()[: length * self.bits].view(length, self.bits)
        return (levels << torch.arange(self.bits, device=packed.device)).sum(1)

"""MAN: flat minima through small layer-wise activation norms."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from fedlight.penalties.base import Penalty, penalized_step
from fedlight.penalties.layers import check_selectors, find_layers, matches_function
from fedlight.penalties.numbers import Number, check_hyperparameter, largest, settings_of


class MAN(Penalty):
    r"""Minimise layer-wise activation norms: adds ζ/2 · Σ_l mean(a_l²) to the task loss.

    a_l is the output of layer l after its non-linearity; the mean runs over batch, channels and positions. The logits
    are left out. The paper shows that this lowers the top eigenvalue of each layer's Hessian, and with them the whole
    network's: training ends in flatter minima.

    It works in ``FederatedTrainer``, in Lightning's ``Trainer`` and ``LightningCLI``, and through :meth:`attach` in any
    other loop. It logs each layer's norm mean(a_l²) as ``man/<layer>`` and the penalty as ``train/penalty``.

    Example::

        trainer = Trainer(callbacks=[MAN(zeta=0.15)])

    Args:
        zeta: ζ, the weight, at least 0. The paper takes 0.15 for a CNN on CIFAR-100 and 0.1 on Tiny-ImageNet. With 0
            the norms are reported and nothing is penalised. A schedule (``{schedule: linear, from: 0, to: 0.15, rounds:
            50}``) counts rounds, or the epochs of Lightning's ``Trainer``.
        layers: whose outputs are a_l. Each entry is a module class, its import path (``my.Swish``, ``torch.nn.ReLU``,
            for classes of torch.nn also ``ReLU``), the name of a submodule (``net.relu1``) or of a function that one
            calls (``net.relu`` for ``F.relu`` in ``net``), or a regular expression that names match in full
            (``net\.relu.*``). By default all activations, without attention, the softmax family, and gates.

    Raises:
        ValueError: if ``zeta`` is negative or not finite, or a regular expression is invalid.
        MisconfigurationException: when attached, if an entry of ``layers`` can match nothing; in the first step, if
            there is no layer.

    Source: Yashwanth et al., "Minimizing Layerwise Activation Norm Improves Generalization in Federated Learning", WACV
    2024 (arXiv:2512.08314).
    """

    def __init__(self, zeta: Number = 0.15, layers: list[str | type[nn.Module]] | None = None) -> None:
        self.zeta = check_hyperparameter("MAN.zeta", zeta)
        self.layers = check_selectors(layers, "MAN")

    sees_functions = True

    def observe(self, module: nn.Module) -> dict[str, nn.Module]:
        """The layers, by the name that they have in the module."""
        return find_layers(module, self.layers)

    def takes(self, name: str, doubt: str, function: bool) -> bool:
        """By default what nothing speaks against; else what ``layers`` names."""
        if self.layers is None:
            return not doubt
        return not function or any(matches_function(selector, name) for selector in self.layers)

    def measure(self, output: Any) -> Tensor:
        """mean(a²) of one layer."""
        if not isinstance(output, Tensor):
            raise TypeError(f"MAN: `layers` names a module that returns {type(output).__name__}, not a Tensor")
        return mean_square(output)

    def penalty(self, module: nn.Module, measured: dict[str, Tensor]) -> Tensor:
        """ζ/2 · Σ_l mean(a_l²)."""
        first, *others = measured.values()
        if largest(self.zeta) == 0:
            return first.new_zeros(())  # 0·mean(a²) would cost a backward pass, and not be 0 where it overflows
        total = torch.stack([first, *(norm.to(first.device) for norm in others)]).sum() if others else first
        weight = cast(Any, self.zeta / 2)
        return total * (weight.to(total) if isinstance(weight, Tensor) else weight)

    def metrics(self, measured: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each layer's norm as ``man/<layer>``."""
        return {f"man/{name}": norm for name, norm in measured.items()}

    def norms(self, module: nn.Module) -> dict[str, Tensor]:
        """mean(a_l²) of each layer in the latest step of a module that this is attached to, by layer."""
        step = penalized_step(module)
        return {} if step is None else step.measured(self)

    @property
    def state_key(self) -> str:
        """Several of them in one trainer are told apart by their settings."""
        return self._generate_state_key(zeta=settings_of(self.zeta) or self.zeta, layers=self.layers)


def mean_square(a: Tensor) -> Tensor:
    """mean(a²), a scalar: in float32 for 16-bit types, where squares overflow, else in the type of ``a``."""
    a = torch.view_as_real(a) if a.is_complex() else a.values() if a.is_nested else a
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        # A compiler fuses this with the layer; a transform has rules for it.
        mean: Tensor = (a.float() if a.dtype.itemsize < 4 else a).square().mean()
        return mean
    if a.dtype.itemsize < 4:
        return cast(Tensor, _MeanSquareOfHalves.apply(a))
    # The one function of torch that takes and gives a² in one pass each: a.square().mean() makes six of them.
    return torch._C._nn.mse_loss(a, a.new_zeros(()), 1) if a.numel() else a.sum()  # type: ignore[arg-type]


class _MeanSquareOfHalves(torch.autograd.Function):
    """mean(a²) in float32, without a copy of ``a`` in it that would live until the backward pass."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        # A norm per sample, then their sum: as exact as summing pairwise.
        rows = a.reshape(1) if a.dim() == 0 else a
        norms = torch.linalg.vector_norm(rows, dim=tuple(range(1, rows.dim())) or (0,), dtype=torch.float32)
        total: Tensor = norms.square().sum()
        return total / max(a.numel(), 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return cast(Tensor, (a.float() * (grad * (2 / max(a.numel(), 1)))).to(a.dtype))  # ∂mean(a²)/∂a = 2a/n

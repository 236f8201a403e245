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
        norms = list(measured.values())
        if largest(self.zeta) == 0:
            return norms[0].new_zeros(())  # 0·mean(a²) would cost a backward pass, and not be 0 where it overflows
        total, weight = torch.stack([norm.to(norms[0].device) for norm in norms]).sum(), cast(Any, self.zeta / 2)
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
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        # A compiler fuses this with the layer; a transform has rules for it.
        mean: Tensor = (a.float() if a.dtype.itemsize < 4 else a).square().mean()
        return mean
    return cast(Tensor, _MeanSquare.apply(a))


class _MeanSquare(torch.autograd.Function):
    """mean(a²) in one pass over memory each way. ``a.square().mean()`` makes six, a fifth of a CNN's step on a CPU."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        # A norm per sample, then their sum: as exact as summing pairwise, and without a copy in another type or layout.
        rows = a.reshape(1) if a.dim() == 0 else a
        dims = tuple(range(1, rows.dim())) or (0,)
        norms = torch.linalg.vector_norm(rows, dim=dims, dtype=torch.float32 if a.dtype.itemsize < 4 else None)
        total: Tensor = norms.square().sum()
        return total / max(a.numel(), 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        slope = grad * (2 / max(a.numel(), 1))  # ∂mean(a²)/∂a = 2a/n
        return cast(Tensor, (a.float() * slope).to(a.dtype) if a.dtype.itemsize < 4 else a * slope)

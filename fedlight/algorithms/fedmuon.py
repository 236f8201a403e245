"""FedMuon, and the optimizer that it needs."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from fedlight.algorithms.base import Message, Number, State
from fedlight.algorithms.fedadamw import _LeaningClients
from fedlight.checks import current
from fedlight.local import ClientResult, LocalObjective


class Muon(Optimizer):
    """Muon for matrices and kernels, with −lr·√max(1, rows/columns)·(U Vᵀ of the momentum); AdamW for all else.

    Torch's own takes matrices only, and a module has one optimizer. Both decay weights by lr·weight_decay.

    Args:
        params: the parameters, or groups of them; a group may have an ``lr``, ``weight_decay`` and ``adamw_lr``.
        lr: Muon's learning rate.
        momentum: β in M ← β·M + g.
        weight_decay: of both.
        adamw_lr: AdamW's learning rate.
    """

    def __init__(
        self,
        params: Iterable[Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        adamw_lr: float = 3e-4,
    ) -> None:
        given, matrices, rest = list[Any](params), list[dict[str, Any]](), list[dict[str, Any]]()
        for group in given if given and isinstance(given[0], dict) else [{"params": given}]:
            parts = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
            matrices.append({**group, "muon": True, "params": [p for p in parts if p.ndim > 1]})
            lr_rest = group.get("adamw_lr", adamw_lr)
            rest.append({**group, "lr": lr_rest, "params": [p for p in parts if p.ndim < 2]})
        self._adamw = AdamW([Parameter(torch.empty(0))], weight_decay=weight_decay)  # its parameters are set in step
        super().__init__(matrices + rest, {**self._adamw.defaults, "lr": lr, "momentum": momentum, "muon": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        groups, self._adamw.state = self.param_groups, self.state
        self._adamw.param_groups = [group for group in groups if not group["muon"]]
        for group, p in ((g, p) for g in groups if g["muon"] for p in g["params"]):
            if p.grad is not None:
                m = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                m.mul_(group["momentum"]).add_(p.grad)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(orthogonal(m.flatten(1)).view_as(p), alpha=group["lr"])
        self._adamw.step()
        return loss


def orthogonal(m: Tensor) -> Tensor:
    """√max(1, rows/columns)·U Vᵀ of a matrix U Σ Vᵀ, about: five steps of Newton and Schulz, as Jordan et al. 2024."""
    rows, columns = m.shape
    x: Tensor = (m if rows <= columns else m.T) / m.norm().clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
    return x if rows <= columns else x.T * (rows / columns) ** 0.5


class FedMuon(_LeaningClients):
    """Clients run Muon, begin with the mean momentum, and lean towards the last step of all.

    Local steps are −η·((1 − alpha)·O + alpha·G): O is the step of ``model.optimizer``, which is
    ``fedlight.algorithms.fedmuon.Muon`` (or torch's, where all parameters are matrices), with its weight decay, and
    G = −mean_sel(Δ_i/(S·η)) of the round before. Then w ← w + mean_sel(Δ_i), and M, which clients begin with, is the
    mean of their momenta. Other moments begin with 0.

    Args:
        alpha: how far steps lean towards G, in [0, 1).
        server_lr: length of the server's step.

    Source: Liu et al., "FedMuon: Accelerating Federated Learning with Matrix Orthogonalization", arXiv:2510.27403,
    from public notes on its algorithm, which has no Nesterov momentum and takes U Vᵀ without a factor. The authors'
    code has both.
    """

    optimizers = (Muon, torch.optim.Muon)
    optimizer_state = ("momentum_buffer",)
    server_zeros = ("direction", "momentum_buffer")  # G and M

    def __init__(self, alpha: Number = 0.5, server_lr: Number = 1.0) -> None:
        super().__init__(alpha, server_lr, below=1)

    def lr_factors(self, steps: int) -> list[float]:
        """1 − alpha, of which the step along G is a multiple, too."""
        return [1 - current(self.alpha)] * steps

    def objective(self, received: State, client: State, weight: float) -> LocalObjective:
        """Begin with M, and lean towards G, which was divided by the reduced rate."""
        state = {"momentum_buffer": received["momentum_buffer"]}
        return LocalObjective(received["params"], optimizer=state, drift=self.alpha * received["direction"])

    def client_update(self, received: State, client: State, result: ClientResult) -> tuple[State, Message]:
        """The model and the momentum."""
        return client, {"params": result.params, **result.optimizer}

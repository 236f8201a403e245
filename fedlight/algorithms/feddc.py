"""FedDC."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlight.algorithms.base import Message, State, mean_gradient
from fedlight.algorithms.feddyn import FedDyn
from fedlight.local import ClientResult, LocalObjective


class FedDC(FedDyn):
    """Each client learns its drift h_i and is corrected for it, in its parameters (as FedDyn) and in its gradient.

    Client i minimises L_i(w) + alpha/(2 p_i)·‖w − (w_t − h_i)‖² + ⟨g/p_i − g_i, w⟩, and with S steps of length η:

        h_i ← h_i + Δ_i,   g_i' = g_i − g/p_i − Δ_i/(S·η)
        w ← mean_sel(w_i) + mean_all(h),   g ← g + Σ_sel p_i (g_i' − g_i) / N

    Args:
        alpha: weight of the quadratic penalty.
        weighting: what p_i is: n_i / mean(n) by ``samples``, or 1 with ``equal``, the letter of the paper.

    Source: Gao et al., "FedDC: Federated Learning with Non-IID Data via Local Drift Decoupling and Correction", CVPR
    2022, equations 2 to 9. The paper adds each client's h_i to its model before averaging the sampled ones; the
    authors' implementation, and this one, adds the mean of h over all clients, which is the same at full participation.
    """

    needs_lr = True
    down_vectors = 2
    up_vectors = 2

    def init_server(self, params: Tensor) -> State:
        """FedDyn's state and g, the mean of the clients' gradients."""
        return {**super().init_server(params), "gradient": torch.zeros_like(params)}

    def init_client(self, params: Tensor) -> State:
        """FedDyn's state and g_i, the client's gradient."""
        return {**super().init_client(params), "gradient": torch.zeros_like(params)}

    def objective(self, server: State, client: State, weight: float) -> LocalObjective:
        """FedDyn's, and the gradient corrected by g/p_i − g_i."""
        start, p = self.broadcast(server), self.p(weight)
        return LocalObjective(
            start=start,
            anchor=start - client["h"],
            proximal=self.alpha / p,
            linear=server["gradient"] / p - client["gradient"],
        )

    def client_update(self, server: State, client: State, result: ClientResult) -> tuple[State, Message]:
        """The new h_i and g_i, and the weighted change of g_i for the server."""
        p = self.p(result.weight)
        gradient = client["gradient"] - server["gradient"] / p + mean_gradient(result)
        change = p * (gradient - client["gradient"])
        return {"h": client["h"] + result.update, "gradient": gradient}, {"gradient_change": change}

    def aggregate(self, server: State, results: Sequence[ClientResult], messages: Sequence[Message]) -> State:
        """FedDyn's model, and the new g."""
        gradient = server["gradient"].clone()
        for message in messages:
            gradient.add_(message["gradient_change"], alpha=1 / self.num_clients)
        return {**super().aggregate(server, results, messages), "gradient": gradient}

"""QFedAvg."""

from fedlight.algorithms.base import Algorithm, Message, Number, Sender, State, check_hyperparameter
from fedlight.checks import check_number
from fedlight.local import ClientResult


class QFedAvg(Algorithm):
    """q-FFL: clients whose loss F_i(w) is larger pull harder, so that losses become more alike.

        w ← w + Σ p_i·F_i^q·Δ_i / Σ p_i·(F_i^q + q·F_i^(q−1)·‖Δ_i‖²/lr)

    F_i is the loss of the model that was broadcast on all of the client's training data, without penalties: one more
    forward pass over it, which every client makes before it trains. That of the local steps would be cheaper,
    and of other models. It is sent with the update, and taken as F_i + 1e-10.

    Args:
        q: how much more; 0 is FedAvg.
        lr: 1/L, the inverse of the paper's Lipschitz constant; by default the mean local learning rate of the round.

    Source: Li et al., "Fair Resource Allocation in Federated Learning", ICLR 2020, algorithm 2, divided by L. There
    clients are drawn by p_i and averaged equally; here p_i weighs them, for any sampler. 1e-10: the authors' code.
    """

    needs_loss = True

    def __init__(self, q: Number = 1.0, lr: float | None = None) -> None:
        self.q = check_hyperparameter("algorithm.q", q)
        self.lr = None if lr is None else check_number("algorithm.lr", lr, positive=True)
        self.needs_lr = lr is None

    def client_update(self, received: State, client: State, result: ClientResult) -> tuple[State, Message]:
        """The model, and F_i."""
        if result.loss < 0:
            raise ValueError(f"algorithm: QFedAvg takes F^q, and the loss of client {result.client} is {result.loss}.")
        return client, {"params": result.params, "loss": result.params.new_tensor([result.loss])}

    def contribution(self, message: Message, sender: Sender) -> State:
        """Numerator and denominator of the step."""
        loss, update = message["loss"].double() + 1e-10, message["update"]
        lr = sender.lr_sum / max(1, sender.num_steps) if self.lr is None else self.lr
        curved = self.q * loss ** (self.q - 1) * update.square().sum() / (lr or 1.0)
        return {"step": sender.weight * loss**self.q * update, "scale": sender.weight * (loss**self.q + curved)}

    def aggregate(self, server: State, total: State) -> State:
        """The step."""
        return {**server, "params": server["params"] + total["step"] / total["scale"]}

"""Adaptive server optimizers: FedOpt, and FedAvgM, FedAdam, FedYogi, FedAdagrad as its named members."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from fedlight.algorithms.base import Algorithm, Message, State, check_hyperparameter, mean_update
from fedlight.local import ClientResult

_PREFIX = "optimizer."
_sgd = partial(torch.optim.SGD, lr=1.0)


class FedOpt(Algorithm):
    """The mean update of the clients is a (negative) gradient, and a torch optimizer on the server follows it.

    The optimizer's state is part of the server's state, and so of every checkpoint.

    Args:
        optimizer: any torch optimizer that needs no closure; its learning rate is the server's.

    Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 1.

    Example::

        algorithm:
          class_path: FedOpt
          init_args:
            optimizer:
              class_path: torch.optim.RMSprop
              init_args: {lr: 0.01}
    """

    def __init__(self, optimizer: OptimizerCallable = _sgd) -> None:
        self.optimizer = optimizer

    def init_server(self, params: Tensor) -> State:
        """The model, the number of steps, and room for all that the optimizer keeps.

        Raises:
            MisconfigurationException: if the optimizer wants a closure.
        """
        probe, optimizer = self._prepare(params)
        probe.grad = torch.zeros_like(params)
        try:
            optimizer.step()
        except TypeError as error:
            raise MisconfigurationException(
                f"algorithm.optimizer: {type(optimizer).__name__} evaluates a closure, which a server that only sees"
                " updates cannot give. Use SGD, Adam, RMSprop or another optimizer that needs none."
            ) from error
        room = {name: torch.zeros_like(value) for name, value in _tensors(optimizer, probe).items()}
        return {"params": params, "steps": torch.zeros((), dtype=torch.int64), **room}

    def aggregate(self, server: State, results: Sequence[ClientResult], messages: Sequence[Message]) -> State:
        """One step of the server's optimizer."""
        params, optimizer = self._prepare(server["params"])
        if int(server["steps"]) > 0:  # before the first step optimizers keep nothing, and then not always zeros
            state = {k.removeprefix(_PREFIX): v.clone() for k, v in server.items() if k.startswith(_PREFIX)}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})
        params.grad = -mean_update(results)
        optimizer.step()
        return {"params": params.detach(), "steps": server["steps"] + 1, **_tensors(optimizer, params)}

    def _prepare(self, params: Tensor) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(params.clone())
        return parameter, self.optimizer([parameter])


def _tensors(optimizer: torch.optim.Optimizer, params: torch.nn.Parameter) -> State:
    """What the optimizer keeps, as entries of the server's state."""
    return {_PREFIX + name: value for name, value in optimizer.state[params].items() if isinstance(value, Tensor)}


class FedAvgM(FedOpt):
    """FedAvg with momentum on the server: v ← momentum·v + mean_sel(Δ), w ← w + server_lr·v.

    Args:
        server_lr: the server's learning rate.
        momentum: its momentum.
        nesterov: whether to use Nesterov's form.

    Source: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", 2019, section 3.3.
    """

    def __init__(self, server_lr: float = 1.0, momentum: float = 0.9, nesterov: bool = False) -> None:
        lr = check_hyperparameter("algorithm.server_lr", server_lr, positive=True)
        momentum = check_hyperparameter("algorithm.momentum", momentum, below=1)
        super().__init__(partial(torch.optim.SGD, lr=lr, momentum=momentum, nesterov=nesterov))


class FedAdam(FedOpt):
    """Adam on the server.

    Args:
        server_lr: the server's learning rate.
        beta1: decay of the mean of the pseudo-gradients.
        beta2: decay of the mean of their squares.
        eps: added to the root of the mean square, the paper's τ, which sets how adaptive the step is.

    Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2. This is torch's Adam, which
    corrects the bias of both means and squares the pseudo-gradient itself; the paper's does not correct, and squares
    the mean.
    """

    def __init__(self, server_lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, eps: float = 1e-3) -> None:
        lr, betas, eps = _adaptive(server_lr, beta1, beta2, eps)
        super().__init__(partial(torch.optim.Adam, lr=lr, betas=betas, eps=eps))


class FedYogi(FedOpt):
    """Yogi on the server: Adam whose mean square moves by a bounded amount in each round.

        m ← beta1·m + (1 − beta1)·g,   v ← v − (1 − beta2)·m²·sign(v − m²),   w ← w − server_lr·m/(√v + eps)

    with g = −mean_sel(Δ).

    Args:
        server_lr: the server's learning rate.
        beta1: decay of m.
        beta2: decay of v.
        eps: the paper's τ, which sets how adaptive the step is.
        initial_accumulator: what v starts from. The paper suggests eps² or more.

    Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2.
    """

    def __init__(
        self,
        server_lr: float = 0.01,
        beta1: float = 0.9,
        beta2: float = 0.99,
        eps: float = 1e-3,
        initial_accumulator: float = 0.0,
    ) -> None:
        lr, betas, eps = _adaptive(server_lr, beta1, beta2, eps)
        start = check_hyperparameter("algorithm.initial_accumulator", initial_accumulator)
        super().__init__(partial(_Yogi, lr=lr, betas=betas, eps=eps, initial_accumulator=start))


class FedAdagrad(FedOpt):
    """Adagrad on the server: v ← v + g², w ← w − server_lr·g/(√v + eps) with g = −mean_sel(Δ).

    Args:
        server_lr: the server's learning rate.
        eps: the paper's τ, which sets how adaptive the step is.
        initial_accumulator: what v starts from. The paper suggests eps² or more.

    Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2 with β₁ = 0, as in its experiments.
    """

    def __init__(self, server_lr: float = 0.1, eps: float = 1e-3, initial_accumulator: float = 0.0) -> None:
        lr = check_hyperparameter("algorithm.server_lr", server_lr, positive=True)
        eps = check_hyperparameter("algorithm.eps", eps, positive=True)
        start = check_hyperparameter("algorithm.initial_accumulator", initial_accumulator)
        super().__init__(partial(torch.optim.Adagrad, lr=lr, eps=eps, initial_accumulator_value=start))


def _adaptive(server_lr: float, beta1: float, beta2: float, eps: float) -> tuple[float, tuple[float, float], float]:
    return (
        check_hyperparameter("algorithm.server_lr", server_lr, positive=True),
        (
            check_hyperparameter("algorithm.beta1", beta1, below=1),
            check_hyperparameter("algorithm.beta2", beta2, below=1),
        ),
        check_hyperparameter("algorithm.eps", eps, positive=True),
    )


class _Yogi(torch.optim.Optimizer):
    """Yogi as in Reddi et al. 2021, which torch lacks."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, initial_accumulator: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "initial_accumulator": initial_accumulator})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["m"] = torch.zeros_like(p)
                    state["v"] = torch.full_like(p, group["initial_accumulator"])
                m = state["m"] = state["m"] * beta1 + p.grad * (1 - beta1)
                v = state["v"] = state["v"] - (1 - beta2) * m**2 * torch.sign(state["v"] - m**2)
                p.sub_(group["lr"] * m / (v.sqrt() + group["eps"]))

"""Adaptive server optimizers: FedOpt, and FedAvgM, FedAdam, FedYogi, FedAdagrad as its named members."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fedlight.algorithms.base import Algorithm, Number, State, check_hyperparameter, mean_update
from fedlight.checks import check_number, largest

_PREFIX = "optimizer."
_sgd = partial(torch.optim.SGD, lr=1.0)


def _above_zero(value: Tensor) -> float:
    """A scheduled number: torch's SGD forgets the step of a round whose momentum is 0, and refuses Nesterov's."""
    return max(float(value), 5e-324)


class FedOpt(Algorithm):
    """The mean update Δ of the clients is a (negative) gradient, and a torch optimizer on the server follows it.

    Δ = Σ_sel n_i Δ_i / Σ_sel n_i, so that plain SGD of learning rate 1 is FedAvg. The optimizer's state is part of the
    server's state, and so of every checkpoint.

    Args:
        optimizer: any torch optimizer that needs no closure; its learning rate is the server's.
        weighted: whether Δ is weighted by samples, as in Hsu et al. 2019; false takes the plain mean, the letter of
            Reddi et al.

    Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 1.

    Example::

        algorithm:
          class_path: FedOpt
          init_args:
            optimizer:
              class_path: torch.optim.RMSprop
              init_args: {lr: 0.01}
    """

    def __init__(self, optimizer: OptimizerCallable = _sgd, weighted: bool = True) -> None:
        self.optimizer, self.mean_by = optimizer, "samples" if weighted else "equal"
        self.settings = getattr(optimizer, "keywords", {})

    def init_server(self, params: Tensor) -> State:
        """The model, the number of steps, and room for all that the optimizer keeps.

        Raises:
            MisconfigurationException: if the optimizer wants a closure, or keeps what is no tensor.
        """
        try:
            probe, optimizer = self._prepare(params, largest)
        except ValueError as error:
            raise MisconfigurationException(f"algorithm.optimizer: {error}.") from error
        probe.grad, group = torch.zeros_like(params), optimizer.param_groups[0]
        before = dict(group)
        try:
            optimizer.step()
        except TypeError as error:
            raise MisconfigurationException(
                f"algorithm.optimizer: {type(optimizer).__name__} evaluates a closure, which a server that only sees"
                " updates cannot give. Use SGD, Adam, RMSprop or another optimizer that needs none."
            ) from error
        lost = [name for name, value in group.items() if value is not before.get(name)]
        lost += [name for name, value in optimizer.state[probe].items() if isinstance(value, int | float)]
        if lost:
            raise MisconfigurationException(
                f"algorithm.optimizer: {type(optimizer).__name__} keeps {', '.join(lost)} as Python has it, and of"
                " its state the server keeps tensors. Let it keep a tensor in `state[parameter]`, as torch's do."
            )
        room = {name: torch.zeros_like(value) for name, value in _tensors(optimizer, probe).items()}
        return {"params": params, "steps": torch.zeros((), dtype=torch.int64), **room}

    def aggregate(self, server: State, total: State) -> State:
        """One step of the server's optimizer."""
        params, optimizer = self._prepare(server["params"])
        if int(server["steps"]) > 0:  # before the first step optimizers keep nothing, and then not always zeros
            state = {k.removeprefix(_PREFIX): v.clone() for k, v in server.items() if k.startswith(_PREFIX)}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})
        params.grad = -mean_update(total).to(params)
        optimizer.step()
        return {**server, "params": params.detach(), "steps": server["steps"] + 1, **_tensors(optimizer, params)}

    def _prepare(self, params: Tensor, number: Any = _above_zero) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(params.clone())
        now = {k: tree_map_only(Tensor, number, value) for k, value in self.settings.items()}
        return parameter, self.optimizer([parameter], **now)


def _tensors(optimizer: torch.optim.Optimizer, params: torch.nn.Parameter) -> State:
    """What the optimizer keeps, as entries of the server's state."""
    return {_PREFIX + name: value for name, value in optimizer.state[params].items() if isinstance(value, Tensor)}


class FedAvgM(FedOpt):
    """FedAvg with momentum on the server: v ← momentum·v + Δ, w ← w + server_lr·v; without momentum it is FedAvg.

    Args:
        server_lr: the server's learning rate.
        momentum: its momentum.
        nesterov: whether to use Nesterov's form.
        weighted: whether Δ is weighted by samples.

    Source: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", 2019, section 3.3.
    """

    def __init__(
        self, server_lr: Number = 1.0, momentum: Number = 0.9, nesterov: bool = False, weighted: bool = True
    ) -> None:
        lr = check_hyperparameter("algorithm.server_lr", server_lr, positive=True)
        momentum = check_hyperparameter("algorithm.momentum", momentum, below=1)
        super().__init__(partial(torch.optim.SGD, lr=lr, momentum=momentum, nesterov=nesterov), weighted)


class FedAdam(FedOpt):
    """Adam on the server, with d = −Δ.

        m ← beta1·m + (1 − beta1)·d,   v ← beta2·v + (1 − beta2)·d²,   w ← w − server_lr·m/(√v + eps)

    Args:
        server_lr: the server's learning rate.
        beta1: decay of m.
        beta2: decay of v.
        eps: the paper's τ, which is added to √v and sets how adaptive the step is.
        initial_accumulator: what v starts from. The paper asks for eps² or more.
        bias_correction: whether m is divided by 1 − beta1^t and v by 1 − beta2^t in round t before the step, as in
            Kingma and Ba's algorithm 1 and torch's Adam. It presumes that v starts from 0.
        weighted: whether Δ is weighted by samples.

    Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2.
    """

    def __init__(
        self,
        server_lr: Number = 0.01,
        beta1: Number = 0.9,
        beta2: Number = 0.99,
        eps: Number = 1e-3,
        initial_accumulator: float = 0.0,
        bias_correction: bool = False,
        weighted: bool = True,
    ) -> None:
        if bias_correction and initial_accumulator:
            raise ValueError(
                "algorithm.bias_correction presumes that v starts from 0: set algorithm.initial_accumulator to 0, or"
                f" leave bias_correction out; found initial_accumulator={initial_accumulator!r}."
            )
        settings = _adaptive(server_lr, beta1, beta2, eps, initial_accumulator)
        super().__init__(partial(_Adaptive, **settings, bias_correction=bias_correction), weighted)


class FedYogi(FedOpt):
    """Yogi on the server: Adam whose mean square moves by a bounded amount in each round, with d = −Δ.

        m ← beta1·m + (1 − beta1)·d,   v ← v − (1 − beta2)·d²·sign(v − d²),   w ← w − server_lr·m/(√v + eps)

    Args:
        server_lr: the server's learning rate.
        beta1: decay of m.
        beta2: decay of v.
        eps: the paper's τ, which is added to √v and sets how adaptive the step is.
        initial_accumulator: what v starts from. The paper asks for eps² or more.
        weighted: whether Δ is weighted by samples.

    Source: Zaheer et al., "Adaptive Methods for Nonconvex Optimization", NeurIPS 2018, algorithm 2, on the server as in
    Reddi et al., "Adaptive Federated Optimization", ICLR 2021, whose algorithm 2 prints m² where Zaheer et al. have d².
    """

    def __init__(
        self,
        server_lr: Number = 0.01,
        beta1: Number = 0.9,
        beta2: Number = 0.99,
        eps: Number = 1e-3,
        initial_accumulator: float = 0.0,
        weighted: bool = True,
    ) -> None:
        settings = _adaptive(server_lr, beta1, beta2, eps, initial_accumulator)
        super().__init__(partial(_Adaptive, **settings, yogi=True), weighted)


class FedAdagrad(FedOpt):
    """Adagrad on the server: v ← v + d², w ← w − server_lr·d/(√v + eps) with d = −Δ.

    Args:
        server_lr: the server's learning rate.
        eps: the paper's τ, which is added to √v and sets how adaptive the step is.
        initial_accumulator: what v starts from. The paper asks for eps² or more.
        weighted: whether Δ is weighted by samples.

    Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2 with β₁ = 0, as in its experiments.
    """

    def __init__(
        self, server_lr: Number = 0.1, eps: Number = 1e-3, initial_accumulator: float = 0.0, weighted: bool = True
    ) -> None:
        made = _adaptive(server_lr, 0, 0, eps, initial_accumulator)
        made = {"lr": made["lr"], "eps": made["eps"], "initial_accumulator_value": made["initial_accumulator"]}
        super().__init__(partial(torch.optim.Adagrad, **made), weighted)


def _adaptive(server_lr: Number, beta1: Number, beta2: Number, eps: Number, start: float) -> dict[str, Any]:
    check = check_hyperparameter
    return {
        "lr": check("algorithm.server_lr", server_lr, positive=True),
        "betas": (check("algorithm.beta1", beta1, below=1), check("algorithm.beta2", beta2, below=1)),
        "eps": check("algorithm.eps", eps, positive=True),
        "initial_accumulator": check_number("algorithm.initial_accumulator", start),
    }


class _Adaptive(torch.optim.Optimizer):
    """Adam and Yogi as in Reddi et al. 2021: torch has no Yogi, and its Adam starts v from 0 and corrects the bias."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, {"yogi": False, "bias_correction": False, **settings})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        (beta1, beta2), p = group["betas"], group["params"][0]
        state, square = self.state[p], p.grad.square()
        if not state:
            start = torch.full_like(p, group["initial_accumulator"])
            state |= {"m": torch.zeros_like(p), "v": start, "step": torch.zeros(())}
        m = state["m"] = state["m"] * beta1 + p.grad * (1 - beta1)
        towards = torch.sign(state["v"] - square) * square if group["yogi"] else state["v"] - square
        v = state["v"] = state["v"] - (1 - beta2) * towards
        t = state["step"] = state["step"] + 1
        if group["bias_correction"]:
            m, v = m / (1 - beta1 ** int(t)), v / (1 - beta2 ** int(t))
        p.sub_(group["lr"] * m / (v.sqrt() + group["eps"]))

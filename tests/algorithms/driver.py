"""Plays rounds with the package's own local step and an algorithm's methods, on the quadratics of the twins."""

import torch
from torch import nn

from fedlight.local import ClientResult, local_gradient
from fedlight.module.parameters import ParameterLayout
from tests.algorithms.twins import Problem


def linear_layout():
    """Four parameters, three weights and a bias."""
    return ParameterLayout.of(nn.Linear(3, 1).double())


def add(total, terms):
    """Add what a client contributes."""
    for name, term in terms.items():
        total[name] = total.get(name, 0) + term


class Driver:
    """A federated experiment with as little as possible around the algorithm.

    Attributes:
        server: the server's state.
        clients: the state of every client that trained.
        evaluated: the views after the last round.
    """

    def __init__(self, algorithm, problem=None, perturbation=None, layout=None):
        self.problem = problem or Problem()
        self.algorithm = algorithm
        self.perturbation = algorithm.perturbation or perturbation
        layout = layout or linear_layout()
        algorithm.setup(len(self.problem.sizes), layout)
        params = torch.tensor(self.problem.start, dtype=torch.float64)
        self.server = algorithm.init_server(params)
        self.clients, self.clients_perturbation, self.last_updates = {}, {}, {}
        self.server_perturbation = {}
        if self.perturbation is not None:
            self.perturbation.setup(layout)
            self.server_perturbation = self.perturbation.init_server(params)
        self.hessians = torch.tensor(self.problem.hessians)
        self.centers = torch.tensor(self.problem.centers)

    def run(self):
        """Play all rounds; returns the server's model after each, as arrays."""
        return [
            self.round(selected, lr).numpy() for selected, lr in zip(self.problem.rounds, self.problem.lrs, strict=True)
        ]

    def round(self, selected, lr):
        algorithm, perturbation = self.algorithm, self.perturbation
        received = algorithm.broadcast(self.server)
        if perturbation is not None:
            received = {**received, **perturbation.broadcast(self.server_perturbation)}
        total, total_perturbation = {"clients": 0}, {"clients": 0}
        self.up, self.down = 0, sum(v.numel() for v in received.values())
        for i in selected:
            params = self.server["params"]
            state = self.clients[i] if i in self.clients else algorithm.init_client(params)
            result = self.local(i, received, state, lr)
            self.clients[i], message = algorithm.client_update(received, state, result)
            up = sum(v.numel() for v in message.values())
            message = {**message, "update": message["params"] - received["params"]}
            if algorithm.keeps_updates:
                message["last_update"] = self.last_updates.get(i, torch.zeros_like(message["update"]))
                self.last_updates[i] = message["update"]
            weight = algorithm.mean_weight(result.num_samples)
            add(total, {"update": weight * message["update"], "weight": torch.tensor(weight, dtype=torch.float64)})
            add(total, {"clients": 1})
            add(total, algorithm.contribution(message, result))
            sent = {}
            if perturbation is not None:
                before = self.clients_perturbation.get(i) or perturbation.init_client(params)
                self.clients_perturbation[i], sent = perturbation.client_update(
                    before, result.perturbation, received["params"]
                )
                add(total_perturbation, {**perturbation.contribution(sent, result), "clients": 1})
            self.up = up + sum(v.numel() for v in sent.values())
        self.server = algorithm.aggregate(self.server, total)
        if perturbation is not None:
            self.server_perturbation = perturbation.aggregate(self.server_perturbation, total_perturbation)
        self.evaluated = algorithm.evaluated(self.server, received, total)
        return self.server["params"]

    def local(self, i, received, state, lr):
        problem, perturbation = self.problem, self.perturbation
        objective = self.algorithm.objective(received, state, float(problem.weights[i]))
        w, kept = objective.start.clone(), {}
        if perturbation is not None:
            before = self.clients_perturbation.get(i) or perturbation.init_client(w)
            kept = perturbation.begin(received, {**state, **before}, objective.start)
        factors = self.algorithm.lr_factors
        lrs = [lr * f for f in ([1] * problem.steps[i] if factors is None else factors(problem.steps[i]))]
        for rate in lrs:
            gradient, kept = local_gradient(
                w, lambda v, first: self.hessians[i] @ (v - self.centers[i]), objective, perturbation, kept, None
            )
            w = w - rate * gradient
        return ClientResult(
            client=i,
            start=objective.start,
            params=w,
            num_samples=problem.sizes[i],
            weight=float(problem.weights[i]),
            num_steps=problem.steps[i],
            lr_sum=sum(lrs),
            perturbation=kept,
            loss=float((d := objective.start - self.centers[i]) @ self.hessians[i] @ d) / 2,
        )

"""A plain PyTorch loop: federated averaging written by hand, one client after another."""

import copy

import torch
from problem import Clock, from_arguments
from torch.nn import functional as F

if __name__ == "__main__":
    problem, _ = from_arguments()
    clock, server = Clock(), problem.net()
    net = copy.deepcopy(server)
    for _ in range(problem.rounds):
        total = {name: torch.zeros_like(value) for name, value in server.state_dict().items()}
        for client in torch.randperm(len(problem.clients))[: problem.per_round].tolist():
            x, y = problem.clients[client]
            net.load_state_dict(server.state_dict())
            optimizer = torch.optim.SGD(net.parameters(), lr=problem.lr)
            for _ in range(problem.epochs):
                for rows in torch.randperm(len(y)).split(problem.batch_size):
                    optimizer.zero_grad()
                    F.cross_entropy(net(x[rows]), y[rows]).backward()
                    optimizer.step()
            for name, value in net.state_dict().items():
                total[name] += value / problem.per_round
        server.load_state_dict(total)
        accuracy = problem.accuracy(server)
        clock.round_ended()
    clock.report(accuracy)

"""Flower's simulation, one core to a client."""

import logging
import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from problem import Clock, from_arguments
from torch.nn import functional as F

problem, arguments = from_arguments()
client_app, server_app = ClientApp(), ServerApp()
clock, accuracies = Clock(), []


@client_app.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    net = problem.net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    x, y = problem.clients[int(context.node_config["partition-id"])]
    optimizer = torch.optim.SGD(net.parameters(), lr=problem.lr)
    for _ in range(problem.epochs):
        for rows in torch.randperm(len(y)).split(problem.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": len(y)})})
    return Message(content=content, reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    net, count = problem.net(), len(problem.clients)

    def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord:
        net.load_state_dict(arrays.to_torch_state_dict())
        accuracies.append(problem.accuracy(net))
        if round > 0:
            clock.round_ended()
        return MetricRecord({"accuracy": accuracies[-1]})

    nodes = {"fraction_train": problem.share, "min_train_nodes": problem.per_round, "min_available_nodes": count}
    strategy = FedAvg(fraction_evaluate=0.0, **nodes)
    strategy.start(grid, ArrayRecord(net.state_dict()), num_rounds=problem.rounds, evaluate_fn=evaluate)


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_simulation(
        server_app,
        client_app,
        num_supernodes=len(problem.clients),
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    clock.report(accuracies[-1])

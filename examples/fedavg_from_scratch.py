"""The whole idea in plain PyTorch: FedAvg with MAN, as a loop that fits on a page.

python examples/fedavg_from_scratch.py

It draws its random numbers where the trainer does, so it ends with the weights of FederatedTrainer: bit for bit with
ZETA = 0, and to rounding with MAN, whose callback sums the squares in another order.
"""

import copy

import torch
from torch import Tensor, nn

from fedlight import ImageData
from fedlight.data import IID
from fedlight.seeding import generator
from fedlight.server.sampling import draw_subset

SEED, ROUNDS, CLIENTS, PER_ROUND, EPOCHS, LR, ZETA = 0, 5, 10, 4, 2, 0.1, 0.15


def make_net() -> nn.Sequential:
    """The same initial weights every time."""
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def loss_with_man(net: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy plus ζ/2 · mean(a²), where a is the hidden layer after its ReLU."""
    activation = net[:3](x)
    return nn.functional.cross_entropy(net[3:](activation), y) + ZETA / 2 * activation.square().mean()


def train_client(net: nn.Sequential, data: ImageData, client: int, round: int) -> nn.Sequential:
    """Local SGD on a copy of the server's model."""
    net, dataset = copy.deepcopy(net), data.client_dataset(client)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    rng = generator(SEED, "order", round, client)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(dataset), generator=rng).split(data.batch_size):
            x, y = dataset.batch(rows)
            optimizer.zero_grad()
            loss_with_man(net, x, y).backward()
            optimizer.step()
    return net


def average(nets: list[nn.Sequential], sizes: list[int]) -> dict[str, Tensor]:
    """Σ n_i w_i / Σ n_i, summed in float64."""
    states = [net.state_dict() for net in nets]
    total = {name: sum(n * s[name].double() for n, s in zip(sizes, states, strict=True)) for name in states[0]}
    return {name: value / sum(sizes) for name, value in total.items()}


def train() -> tuple[nn.Sequential, ImageData]:
    """All rounds; prints the accuracy of each."""
    data = ImageData("digits", num_clients=CLIENTS, partitioner=IID(), batch_size=16)
    data.setup()
    net = make_net()
    x, y = data.val_dataset().batch(torch.arange(len(data.val_dataset())))
    for round in range(ROUNDS):
        selected = draw_subset(CLIENTS, PER_ROUND, generator(SEED, "sampling", round))
        trained = [train_client(net, data, int(client), round) for client in selected]
        net.load_state_dict(average(trained, [data.client_size(int(client)) for client in selected]))
        accuracy = (net(x).argmax(1) == y).float().mean().item()
        print(f"round {round + 1}/{ROUNDS}  accuracy {accuracy:.4f}")
    return net, data


if __name__ == "__main__":
    train()

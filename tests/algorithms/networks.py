"""Twins of the methods that need a network: torch's functions on one vector of parameters, and torch's derivatives."""

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

from fedlight.data.arrays import ArrayDataset
from fedlight.data.datamodule import FederatedDataModule

SIZES = (4, 8, 6)
ROUNDS = ((0, 1), (1, 2), (0, 1, 2), (0, 2))
STEPS, LR = 3, 0.5
"""Each client takes so many steps on all of its samples."""


def seeded(*shape, seed=0):
    """Normal numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Points(FederatedDataModule):
    """Three clients with one batch each; the twin reads what they have as ``points``."""

    def __init__(self):
        super().__init__(batch_size=max(SIZES))
        self.num_clients = len(SIZES)
        x = seeded(sum(SIZES), 4)
        self.all = ArrayDataset(x, (x @ seeded(4, 3, seed=1)).argmax(1))
        self.rows = torch.arange(len(x)).split(SIZES)
        self.points = [(x[rows], self.all.targets[rows]) for rows in self.rows]

    def client_dataset(self, client):
        return self.all.view(self.rows[client], None)


class Network(LightningModule):
    """Two layers; features are what the second one takes.

    Args:
        optimizer: ``optimizer(params)``; plain SGD by default.
    """

    def __init__(self, optimizer=None):
        super().__init__()
        self.first, self.act, self.head = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)
        self.double()
        self.optimizer = optimizer or (lambda params: torch.optim.SGD(params, lr=LR))
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(seeded(*p.shape, seed=i))

    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.head(self.act(self.first(x))), y)

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def begin():
    """The parameters of the network as one vector, ``[43]``."""
    return torch.cat([p.detach().reshape(-1) for p in Network().parameters()])


def outputs(w, x):
    """Features and logits."""
    a, b, c, d = w.split((20, 5, 15, 3))
    z = torch.tanh(x @ a.view(5, 4).T + b)
    return z, z @ c.view(3, 5).T + d


def slope(loss, w):
    """The derivative of a loss."""
    w = w.detach().requires_grad_()
    return torch.autograd.grad(loss(w), w)[0]


def averaged(train):
    """The server's models in FedAvg; ``train(i, w, x, y)`` is what client i makes of w."""
    w, found = begin(), []
    for clients in ROUNDS:
        models = [train(i, w, *Points().points[i]) for i in clients]
        w = sum(SIZES[i] * v for i, v in zip(clients, models, strict=True)) / sum(SIZES[i] for i in clients)
        found.append(w.numpy())
    return found


def compared(term, rho):
    """FedAvg with SAM and a term ``term(w, start, last, x, y)``; a client's first last model is where it starts."""
    last = {}

    def train(i, start, x, y):
        v, before = start, last.get(i, start)
        for _ in range(STEPS):

            def loss(w):
                return F.cross_entropy(outputs(w, x)[1], y) + term(w, start, before, x, y)

            g = slope(loss, v)
            v = v - LR * slope(loss, v + rho * g / g.norm())
        last[i] = v
        return v

    return averaged(train)


def moon(mu, tau, rho=0.0):
    """The authors' code: cross-entropy of the similarities, of which the first one is right."""

    def term(w, start, last, x, y):
        z, near, far = (outputs(v, x)[0] for v in (w, start, last))
        cos = nn.CosineSimilarity(dim=-1)
        both = torch.cat([cos(z, near).reshape(-1, 1), cos(z, far).reshape(-1, 1)], dim=1) / tau
        return mu * F.cross_entropy(both, torch.zeros(len(x), dtype=torch.long))

    return compared(term, rho)


def adamw(lr=0.05, decay=0.1, beta1=0.9, beta2=0.999, eps=1e-8):
    """A step of AdamW by Kingma and Ba, and Loshchilov and Hutter, for a slice of w."""

    def step(w, g, m, v, t):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        update = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)
        return w - lr * update - lr * decay * w, m, v

    return step


BLOCKS = (20, 5, 15, 3)


def fedadamw(alpha, lr, decay):
    """Notes on the paper's algorithm, with one count of steps for both moments."""
    step, t, second, toward = adamw(lr=lr, decay=decay), 0, torch.zeros(4, dtype=torch.float64), 0.0
    w, found = begin(), []
    for clients in ROUNDS:
        moves, seconds = [], []
        for i in clients:
            (x, y), u, m = Points().points[i], w, torch.zeros(43, dtype=torch.float64)
            v = torch.cat([s.repeat(n) for s, n in zip(second, BLOCKS, strict=True)])
            for k in range(STEPS):
                g = slope(lambda p, x=x, y=y: F.cross_entropy(outputs(p, x)[1], y), u)
                new, m, v = step(u, g, m, v, t + k + 1)
                u = new - lr * alpha * toward
            moves.append(u - w)
            seconds.append(torch.stack([part.mean() for part in v.split(BLOCKS)]))
        toward = -sum(moves) / (len(clients) * STEPS * lr)
        w, second, t = w + sum(moves) / len(clients), sum(seconds) / len(clients), t + STEPS
        found.append(w.numpy())
    return found


def polar(m):
    """About U Vᵀ: the quintic polynomial of Jordan et al. 2024 on the singular values."""
    u, s, vt = torch.linalg.svd(m, full_matrices=False)
    s = s / m.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vt


def fedmuon(alpha, lr, adamw_lr, beta, decay):
    """Notes on the paper's algorithm; vectors by AdamW, whose moments begin anew."""
    step, w, found = adamw(lr=adamw_lr * (1 - alpha), decay=decay), begin(), []
    momentum, toward = torch.zeros(43, dtype=torch.float64), 0.0
    matrices = (slice(0, 20), 5, 4), (slice(25, 40), 3, 5)
    for clients in ROUNDS:
        moves, momenta = [], []
        for i in clients:
            (x, y), u, big = Points().points[i], w, momentum.clone()
            m, v = torch.zeros(2, 43, dtype=torch.float64)
            for k in range(STEPS):
                g = slope(lambda p, x=x, y=y: F.cross_entropy(outputs(p, x)[1], y), u)
                new, m, v = step(u, g, m, v, k + 1)
                for part, rows, columns in matrices:
                    big[part] = beta * big[part] + g[part]
                    o = polar(big[part].view(rows, columns)).reshape(-1) * max(1, rows / columns) ** 0.5
                    new[part] = u[part] - (1 - alpha) * lr * (o + decay * u[part])
                u = new - lr * alpha * toward
            moves.append(u - w)
            momenta.append(big)
        toward = -sum(moves) / (len(clients) * STEPS * lr)
        w, momentum = w + sum(moves) / len(clients), sum(momenta) / len(clients)
        found.append(w.numpy())
    return found


def fedntd(beta, tau, rho=0.0):
    """The authors' code: the entries of the true class are taken out."""

    def term(w, start, last, x, y):
        rest = torch.tensor([[c for c in range(3) if c != label] for label in y.tolist()])
        new, old = (F.softmax(outputs(v, x)[1].gather(1, rest) / tau, dim=1) for v in (w, start))
        return beta * (old * (old / new).log()).sum() / len(x)

    return compared(term, rho)

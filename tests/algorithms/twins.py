"""Slow, obvious twins of all algorithms, in NumPy, written from the papers' equations and not from the package.

Clients are quadratics L_i(w) = ½(w − b_i)ᵀA_i(w − b_i), so their gradients are exact. Every twin keeps the state of all
clients in a list and takes means over all clients as the papers write them. It returns the server's model after each
round.
"""

from dataclasses import dataclass, field

import numpy as np

PARAMS = 4
"""Length of w: the last entry is a bias, the others are weights."""


@dataclass
class Problem:
    """Three unequal clients, of which some take part in each round, with unequal numbers of local steps."""

    sizes: tuple[int, ...] = (10, 25, 55)
    rounds: tuple[tuple[int, ...], ...] = ((0, 2), (1,), (0, 1, 2))
    lrs: tuple[float, ...] = (0.1, 0.08, 0.06)
    steps: tuple[int, ...] = (2, 3, 4)
    start: np.ndarray = field(default_factory=lambda: np.array([0.7, -0.4, 1.1, 0.3]))

    def __post_init__(self):
        rng = np.random.default_rng(7)
        n = len(self.sizes)
        roots = rng.normal(size=(n, PARAMS, PARAMS))
        self.hessians = roots @ roots.transpose(0, 2, 1) / PARAMS + 0.2 * np.eye(PARAMS)
        self.centers = rng.normal(size=(n, PARAMS))
        self.weights = np.array(self.sizes) / np.mean(self.sizes)

    def gradient(self, i, w):
        return self.hessians[i] @ (w - self.centers[i])


class Plain:
    """The gradient at w."""

    def __init__(self, problem):
        self.problem = problem

    def begin(self, i, received):
        pass

    def __call__(self, i, w):
        return self.problem.gradient(i, w)

    def end_round(self, selected):
        pass


class Sam(Plain):
    def __init__(self, problem, rho):
        super().__init__(problem)
        self.rho = rho

    def __call__(self, i, w):
        g = self.problem.gradient(i, w)
        return self.problem.gradient(i, w + self.rho * g / np.sqrt(np.sum(g**2)))


class Asam(Sam):
    def __init__(self, problem, rho, eta):
        super().__init__(problem, rho)
        self.eta = eta

    def __call__(self, i, w):
        g = self.problem.gradient(i, w)
        t = np.abs(w) + self.eta
        t[-1] = 1  # the bias
        return self.problem.gradient(i, w + self.rho * t**2 * g / np.sqrt(np.sum((t * g) ** 2)))


class Lesam(Sam):
    def __init__(self, problem, rho):
        super().__init__(problem, rho)
        self.old = {}
        self.perturbation = {}

    def begin(self, i, received):
        direction = self.old[i] - received if i in self.old else np.zeros(PARAMS)
        norm = np.sqrt(np.sum(direction**2))
        self.perturbation[i] = self.rho * direction / norm if norm else direction
        self.old[i] = received.copy()

    def __call__(self, i, w):
        return self.problem.gradient(i, w + self.perturbation[i])


class Dual(Sam):
    def __init__(self, problem, rho):
        super().__init__(problem, rho)
        self.mu_i = [np.zeros(PARAMS) for _ in problem.sizes]
        self.mu = np.zeros(PARAMS)

    def __call__(self, i, w):
        s = self.problem.gradient(i, w) - self.mu_i[i] - self.mu
        s = self.rho * s / np.sqrt(np.sum(s**2))
        self.mu_i[i] = self.mu_i[i] + (s - self.mu)
        return self.problem.gradient(i, w + s)

    def end_round(self, selected):
        mean = np.mean([self.mu_i[i] for i in selected], axis=0)
        self.mu = self.rho * mean / np.sqrt(np.sum(mean**2))


def local(problem, oracle, i, received, lr, correct=lambda g, w: g, start=None):
    """Local steps of plain SGD along the corrected gradient, from what was received or from elsewhere."""
    oracle.begin(i, received)
    w = (received if start is None else start).copy()
    for _ in range(problem.steps[i]):
        w = w - lr * correct(oracle(i, w), w)
    return w


def rounds(problem, oracle, play):
    """Play all rounds: ``play(t, selected, lr)`` returns the server's model."""
    out = []
    for t, (selected, lr) in enumerate(zip(problem.rounds, problem.lrs, strict=True)):
        out.append(play(t, selected, lr).copy())
        oracle.end_round(selected)
    return out


def fedavg(problem, oracle, server_lr=1.0, mu=0.0):
    w = problem.start

    def play(t, selected, lr):
        nonlocal w
        sent = w
        models = [local(problem, oracle, i, sent, lr, lambda g, v: g + mu * (v - sent)) for i in selected]
        n = [problem.sizes[i] for i in selected]
        mean = sum(k * v for k, v in zip(n, models, strict=True)) / sum(n)
        w = (1 - server_lr) * sent + server_lr * mean
        return w

    return rounds(problem, oracle, play)


def scaffold(problem, oracle, server_lr=1.0, equal=False):
    n, p = len(problem.sizes), np.ones(len(problem.sizes)) if equal else problem.weights
    x, c = problem.start, np.zeros(PARAMS)
    ci = [np.zeros(PARAMS) for _ in range(n)]

    def play(t, selected, lr):
        nonlocal x, c
        dy, dc = [], []
        for i in selected:
            y = local(problem, oracle, i, x, lr, lambda g, v, i=i: g - ci[i] + c / p[i])
            plus = ci[i] - c + (x - y) / (problem.steps[i] * lr)
            dy.append(y - x)
            dc.append(p[i] * (plus - ci[i]))
            ci[i] = plus
        x = x + server_lr * np.mean(dy, axis=0)
        c = c + len(selected) / n * np.mean(dc, axis=0)
        return x

    return rounds(problem, oracle, play)


def feddyn(problem, oracle, alpha, equal=False):
    """In the paper's form: g_i = ∇L_i of the last round, h the server's state."""
    n, p = len(problem.sizes), np.ones(len(problem.sizes)) if equal else problem.weights
    w, h = problem.start, np.zeros(PARAMS)
    gi = [np.zeros(PARAMS) for _ in range(n)]

    def play(t, selected, lr):
        nonlocal w, h
        models = []
        for i in selected:
            a = alpha / p[i]
            sent = w
            v = local(problem, oracle, i, sent, lr, lambda g, v, i=i, a=a, s=sent: g - gi[i] + a * (v - s))
            gi[i] = gi[i] - a * (v - sent)
            models.append(v)
        h = h - alpha / n * sum(v - w for v in models)
        w = np.mean(models, axis=0) - h / alpha
        return w

    return rounds(problem, oracle, play)


def feddc(problem, oracle, alpha, equal=False):
    n, p = len(problem.sizes), np.ones(len(problem.sizes)) if equal else problem.weights
    w, g_all = problem.start, np.zeros(PARAMS)
    h = [np.zeros(PARAMS) for _ in range(n)]
    g_i = [np.zeros(PARAMS) for _ in range(n)]

    def play(t, selected, lr):
        nonlocal w, g_all
        models, change = [], np.zeros(PARAMS)
        for i in selected:
            sent = w

            def correct(g, v, i=i, sent=sent):
                penalty = alpha / p[i] * (h[i] + v - sent)
                return g + penalty + g_all / p[i] - g_i[i]

            v = local(problem, oracle, i, sent, lr, correct)
            plus = g_i[i] - g_all / p[i] + (sent - v) / (problem.steps[i] * lr)
            change += p[i] * (plus - g_i[i])
            g_i[i] = plus
            h[i] = h[i] + (v - sent)
            models.append(v)
        w = np.mean(models, axis=0) + np.mean(h, axis=0)
        g_all = g_all + change / n
        return w

    return rounds(problem, oracle, play)


def fedcm(problem, oracle, alpha, server_lr=1.0):
    x, delta = problem.start, np.zeros(PARAMS)

    def play(t, selected, lr):
        nonlocal x, delta
        sent, direction = x, delta
        models = [
            local(problem, oracle, i, sent, lr, lambda g, v: alpha * g + (1 - alpha) * direction) for i in selected
        ]
        delta = np.mean([(sent - v) / (lr * problem.steps[i]) for i, v in zip(selected, models, strict=True)], axis=0)
        x = sent + server_lr * np.mean([v - sent for v in models], axis=0)
        return x

    return rounds(problem, oracle, play)


def fednova(problem, oracle, server_lr=1.0):
    x = problem.start

    def play(t, selected, lr):
        nonlocal x
        q = np.array([problem.sizes[i] for i in selected]) / sum(problem.sizes[i] for i in selected)
        d = [(x - local(problem, oracle, i, x, lr)) / (lr * problem.steps[i]) for i in selected]
        tau = sum(qi * problem.steps[i] for qi, i in zip(q, selected, strict=True))
        x = x - server_lr * tau * lr * sum(qi * di for qi, di in zip(q, d, strict=True))
        return x

    return rounds(problem, oracle, play)


def fedopt(problem, oracle, step, weighted=True):
    """``step(t, w, d)`` is the server's optimizer; t counts from 1.

    The pseudo-gradient d is weighted by samples as w_t − Σ (n_k / n) w_k in Hsu et al. 2019, section 3.3; Reddi et al.
    2021, algorithm 1, have 1/|S| instead.
    """
    w = problem.start

    def play(t, selected, lr):
        nonlocal w
        n = np.array([problem.sizes[i] if weighted else 1 for i in selected])
        models = np.array([local(problem, oracle, i, w, lr) for i in selected])
        w = step(t + 1, w, w - (n / n.sum()) @ models)
        return w

    return rounds(problem, oracle, play)


def sgd_momentum(lr, momentum, nesterov=False):
    """Hsu et al. 2019, section 3.3."""
    v = np.zeros(PARAMS)

    def step(t, w, g):
        nonlocal v
        v = momentum * v + g
        return w - lr * (g + momentum * v if nesterov else v)

    return step


def adam(lr, beta1, beta2, tau, start=0.0, corrected=False):
    """Reddi et al. 2021, algorithm 2; ``corrected`` is algorithm 1 of Kingma and Ba 2015."""
    m, v = np.zeros(PARAMS), np.full(PARAMS, start)

    def step(t, w, g):
        nonlocal m, v
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = (m / (1 - beta1**t), v / (1 - beta2**t)) if corrected else (m, v)
        return w - lr * m_hat / (np.sqrt(v_hat) + tau)

    return step


def yogi(lr, beta1, beta2, tau, start):
    """Zaheer et al. 2018, algorithm 2, entry by entry: v moves towards g² by (1 − β₂)·g². (Not from Reddi et al.)"""
    m, v = np.zeros(PARAMS), np.full(PARAMS, start)

    def step(t, w, g):
        nonlocal m
        m = beta1 * m + (1 - beta1) * g
        for k in range(PARAMS):
            v[k] += (1 - beta2) * g[k] ** 2 * (1 if g[k] ** 2 > v[k] else -1 if g[k] ** 2 < v[k] else 0)
        return w - lr * m / (np.sqrt(v) + tau)

    return step


def adagrad(lr, tau, start):
    """Duchi et al. 2011 on the pseudo-gradient, with τ as in Reddi et al. 2021."""
    v = np.full(PARAMS, start)

    def step(t, w, g):
        nonlocal v
        v = v + g * g
        return w - lr * g / (np.sqrt(v) + tau)

    return step


def rmsprop(lr, decay, eps):
    v = np.zeros(PARAMS)

    def step(t, w, g):
        nonlocal v
        v = decay * v + (1 - decay) * g**2
        return w - lr * g / (np.sqrt(v) + eps)

    return step


def fedbn(problem, oracle, local_entries, server_lr=1.0):
    """FedAvg on the entries that are shared; the others live at the clients, and the server has their mean."""
    n = len(problem.sizes)
    shared = [k for k in range(PARAMS) if k not in local_entries]
    w = problem.start.copy()
    own = [problem.start[local_entries] for _ in range(n)]

    def play(t, selected, lr):
        nonlocal w
        models = []
        for i in selected:
            begin = w.copy()
            begin[local_entries] = own[i]
            models.append(local(problem, oracle, i, begin, lr))
            own[i] = models[-1][local_entries]
        sizes = [problem.sizes[i] for i in selected]
        mean = sum(k * v for k, v in zip(sizes, models, strict=True)) / sum(sizes)
        w = w.copy()
        w[shared] = (1 - server_lr) * w[shared] + server_lr * mean[shared]
        w[local_entries] = mean[local_entries]  # what the server's model is evaluated with
        return w

    return rounds(problem, oracle, play)


def fedgloss(problem, oracle, rho, beta, server_lr=1.0):
    n = len(problem.sizes)
    w, sigma = problem.start, np.zeros(PARAMS)
    sigma_i = [np.zeros(PARAMS) for _ in range(n)]
    last = None

    def play(t, selected, lr):
        nonlocal w, sigma, last
        epsilon = np.zeros(PARAMS) if last is None else rho * last / np.sqrt(np.sum(last**2))
        sent = w + epsilon
        models = []
        for i in selected:
            v = local(problem, oracle, i, sent, lr, lambda g, v, i=i: g - sigma_i[i] + (v - sent) / beta)
            sigma_i[i] = sigma_i[i] - (v - sent) / beta
            models.append(v)
        sizes = [problem.sizes[i] for i in selected]
        last = sum(k * (sent - v) for k, v in zip(sizes, models, strict=True)) / sum(sizes)
        sigma = np.mean(sigma_i, axis=0)
        w = w - server_lr * last - beta * sigma
        return w

    return rounds(problem, oracle, play)

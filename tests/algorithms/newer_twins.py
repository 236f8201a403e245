"""Twins of the methods since 2022; see twins.py. Each says what it was written from."""

import numpy as np

from .twins import PARAMS, Plain, Sam, local, rounds


def norm(v):
    return np.sqrt(np.sum(v**2))


def fedacg(problem, oracle, lam, beta):
    """The authors' code: the model moves ahead, clients start there, and their mean is the next model."""
    theta, m = problem.start, np.zeros(PARAMS)

    def play(t, selected, lr):
        nonlocal theta, m
        ahead = theta + lam * m
        models = [local(problem, oracle, i, ahead, lr, lambda g, v: g + beta * (v - ahead)) for i in selected]
        theta = np.mean(models, axis=0)
        m = lam * m + np.mean([v - ahead for v in models], axis=0)
        return theta

    return rounds(problem, oracle, play)


def fednsam_along_momentum(problem, gamma):
    """The code in the authors' FedNSAM repository."""
    x, m = problem.start, np.zeros(PARAMS)

    def play(t, selected, lr):
        nonlocal x, m
        models = []
        for i in selected:
            v = x.copy()
            for _ in range(problem.steps[i]):
                v = v - lr * problem.gradient(i, v + gamma * m)
            models.append(v)
        m = gamma * m + sum(v - x for v in models) / len(models)
        x = x + m
        return x

    return rounds(problem, Plain(problem), play)


def qfedavg(problem, oracle, q, lipschitz=None):
    """The paper's algorithm 2 with L = 1/lr, clients weighed by p_i."""
    w = problem.start

    def play(t, selected, lr):
        nonlocal w
        top, bottom, scale = np.zeros(PARAMS), 0.0, lipschitz or 1 / lr
        for i in selected:
            d = w - problem.centers[i]
            loss = d @ problem.hessians[i] @ d / 2 + 1e-10
            dw = scale * (w - local(problem, oracle, i, w, lr))
            top = top + problem.weights[i] * loss**q * dw
            bottom = bottom + problem.weights[i] * (q * loss ** (q - 1) * norm(dw) ** 2 + scale * loss**q)
        w = w - top / bottom
        return w

    return rounds(problem, oracle, play)


def fedexp(problem, oracle, eps):
    """The paper's algorithm 1, in its form with Δ_i = w − w_i."""
    w = problem.start

    def play(t, selected, lr):
        nonlocal w
        deltas = [w - local(problem, oracle, i, w, lr) for i in selected]
        mean = sum(deltas) / len(deltas)
        eta = sum(norm(d) ** 2 for d in deltas) / (2 * len(deltas) * (norm(mean) ** 2 + eps))
        w = w - max(1.0, eta) * mean
        return w

    return rounds(problem, oracle, play)


def fedvarp(problem, oracle, server_lr=1.0):
    """The paper's estimate, as public code states it, with Δ_i = w − w_i and y of all clients in a list."""
    w, y = problem.start, [np.zeros(PARAMS) for _ in problem.sizes]

    def play(t, selected, lr):
        nonlocal w
        delta = {i: w - local(problem, oracle, i, w, lr) for i in selected}
        v = np.mean(y, axis=0) + np.mean([delta[i] - y[i] for i in selected], axis=0)
        w = w - server_lr * v
        for i in selected:
            y[i] = delta[i]
        return w

    return rounds(problem, oracle, play)


def fedinit(problem, oracle, beta):
    """The equation in the authors' FL-Simulator; a client's first start is w, and the server takes the mean."""
    w, last = problem.start, {}

    def play(t, selected, lr):
        nonlocal w
        for i in selected:
            last[i] = local(problem, oracle, i, w, lr, start=w + beta * (w - last.get(i, w)))
        w = np.mean([last[i] for i in selected], axis=0)
        return w

    return rounds(problem, oracle, play)


def falling(problem, oracle, i, start, lr, rho, correction):
    """The paper's cyclic rate: η_k = (1 − k/K)·η + (k/K)·ρη. Returns the model and Σ η_k."""
    oracle.begin(i, start)
    v, total, big_k = start.copy(), 0.0, problem.steps[i]
    for k in range(big_k):
        eta = (1 - k / big_k) * lr + (k / big_k) * rho * lr
        v = v - eta * (oracle(i, v) + correction)
        total += eta
    return v, total


def fedswa(problem, oracle, rho, alpha):
    """The paper's algorithm 1."""
    x = problem.start

    def play(t, selected, lr):
        nonlocal x
        v = np.mean([falling(problem, oracle, i, x, lr, rho, 0)[0] for i in selected], axis=0)
        x = x + alpha * (v - x)
        return x

    return rounds(problem, oracle, play)


def fedmoswa(problem, oracle, rho, alpha, gamma):
    """The paper's algorithm 2 with its option II."""
    x, m = problem.start, np.zeros(PARAMS)
    c = [np.zeros(PARAMS) for _ in problem.sizes]

    def play(t, selected, lr):
        nonlocal x, m
        models, distances = [], []
        for i in selected:
            v, total = falling(problem, oracle, i, x, lr, rho, m - c[i])
            c[i] = c[i] - m + (x - v) / total
            models.append(v)
            distances.append(c[i] - m)
        x = x + alpha * (np.mean(models, axis=0) - x)
        m = m + gamma * np.mean(distances, axis=0)
        return x

    return rounds(problem, oracle, play)


def fedtoga(problem, rho, alpha, kappa, beta, equal=False):
    """Public code: weight decay alpha and a linear term instead of the proximal one, and the mean of h added."""
    p = np.ones(len(problem.sizes)) if equal else problem.weights
    w, delta = problem.start, np.zeros(PARAMS)
    h = [np.zeros(PARAMS) for _ in problem.sizes]

    def play(t, selected, lr):
        nonlocal w, delta
        models, changes = [], []
        for i in selected:
            v, a = w.copy(), alpha / p[i]
            for _ in range(problem.steps[i]):
                e = problem.gradient(i, v) + kappa * delta
                g = problem.gradient(i, v + rho * e / norm(e))
                v = v - lr * (g + a * v + a * (h[i] - w) + beta * delta)
            h[i] = h[i] + (v - w)
            models.append(v)
            changes.append((v - w) / problem.steps[i])
        delta = -np.mean(changes, axis=0)
        w = np.mean(models, axis=0) + np.mean(h, axis=0)
        return w

    return rounds(problem, Sam(problem, rho), play)


def fedwmsam(problem, rho, alpha, speed, server_lr=1.0):
    """The README's equations; alpha, c and the momentum as in the authors' server."""
    x, c, m = problem.start, np.zeros(PARAMS), np.zeros(PARAMS)
    ci = [np.zeros(PARAMS) for _ in problem.sizes]

    def play(t, selected, lr):
        nonlocal x, c, m, alpha
        updates, changes, values = [], np.zeros(PARAMS), []
        for i in selected:
            own, v = m + alpha / (1 - alpha) * (c - ci[i]), x.copy()
            for b in range(problem.steps[i]):
                d = (x + b * own) - v
                g = problem.gradient(i, v + rho * d / norm(d) if b else v)
                v = v - lr * (alpha * g + (1 - alpha) * own)
            updates.append(v - x)
            values.append(0.0 if norm(m) == 0 else (v - x) @ m / (norm(v - x) * norm(m)) + 1)
            new = ci[i] - c - (v - x) / problem.steps[i] / lr
            changes, ci[i] = changes + (new - ci[i]), new
        alpha = (1 - speed) * alpha + speed * max(0.1, min(float(np.mean(values)), 0.9))
        c = c + changes / len(ci)
        m = -np.mean([u / problem.steps[i] / lr for i, u in zip(selected, updates, strict=True)], axis=0)
        x = x + server_lr * np.mean(updates, axis=0)
        return x

    return rounds(problem, Plain(problem), play)

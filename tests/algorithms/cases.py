"""What is compared with which twin: each algorithm, its settings that change a formula, and each perturbation.

`fedlight check-fidelity` reads these tables, here and in the wheel; no test framework is imported.
"""

from functools import partial

import numpy as np
import torch

from fedlight import algorithms
from fedlight.perturbations import ASAM, LESAM, SAM, DualSAM

from . import networks, twins
from . import newer_twins as newer
from .fitted import fit, fit_network, longer
from .twins import Asam, Dual, Lesam, Plain, Sam

CASES = {
    "Algorithm": (lambda: algorithms.Algorithm(), lambda p: twins.fedavg(p, Plain(p))),
    "FedAvg": (lambda: algorithms.FedAvg(0.7), lambda p: twins.fedavg(p, Plain(p), 0.7)),
    "FedProx": (lambda: algorithms.FedProx(0.3, 0.7), lambda p: twins.fedavg(p, Plain(p), 0.7, mu=0.3)),
    "SCAFFOLD": (lambda: algorithms.SCAFFOLD(0.7), lambda p: twins.scaffold(p, Plain(p), 0.7)),
    "FedDyn": (lambda: algorithms.FedDyn(0.3), lambda p: twins.feddyn(p, Plain(p), 0.3)),
    "FedDC": (lambda: algorithms.FedDC(0.3), lambda p: twins.feddc(p, Plain(p), 0.3)),
    "FedCM": (lambda: algorithms.FedCM(0.3, 0.7), lambda p: twins.fedcm(p, Plain(p), 0.3, 0.7)),
    "FedSpeed": (lambda: algorithms.FedSpeed(0.1, 0.3), lambda p: twins.feddyn(p, Sam(p, 0.1), 0.3)),
    "FedOpt": (
        lambda: algorithms.FedOpt(partial(torch.optim.RMSprop, lr=0.05, alpha=0.9, eps=1e-3)),
        lambda p: twins.fedopt(p, Plain(p), twins.rmsprop(0.05, 0.9, 1e-3)),
    ),
    "FedAvgM": (
        lambda: algorithms.FedAvgM(0.7, 0.9),
        lambda p: twins.fedopt(p, Plain(p), twins.sgd_momentum(0.7, 0.9)),
    ),
    "FedAdam": (
        lambda: algorithms.FedAdam(0.05, 0.8, 0.95, 0.01, 1e-4),
        lambda p: twins.fedopt(p, Plain(p), twins.adam(0.05, 0.8, 0.95, 0.01, 1e-4)),
    ),
    "FedYogi": (
        lambda: algorithms.FedYogi(0.05, 0.8, 0.95, 0.01, 1e-4),
        lambda p: twins.fedopt(p, Plain(p), twins.yogi(0.05, 0.8, 0.95, 0.01, 1e-4)),
    ),
    "FedAdagrad": (
        lambda: algorithms.FedAdagrad(0.05, 0.01, 1e-4),
        lambda p: twins.fedopt(p, Plain(p), twins.adagrad(0.05, 0.01, 1e-4)),
    ),
    "FedNova": (lambda: algorithms.FedNova(0.7), lambda p: twins.fednova(p, Plain(p), 0.7)),
    "FedBN": (lambda: algorithms.FedBN(0.7), lambda p: twins.fedbn(p, Plain(p), [2, 3], 0.7)),
    "FedGAMMA": (lambda: algorithms.FedGAMMA(0.1, 0.7), lambda p: twins.scaffold(p, Sam(p, 0.1), 0.7)),
    "FedSMOO": (lambda: algorithms.FedSMOO(0.1, 0.3), lambda p: twins.feddyn(p, Dual(p, 0.1), 0.3)),
    "MoFedSAM": (lambda: algorithms.MoFedSAM(0.1, 0.3, 0.7), lambda p: twins.fedcm(p, Sam(p, 0.1), 0.3, 0.7)),
    "FedGloSS": (lambda: algorithms.FedGloSS(0.1, 5.0, 0.7), lambda p: twins.fedgloss(p, Plain(p), 0.1, 5.0, 0.7)),
    "FedSAM": (lambda: algorithms.FedSAM(0.1, 0.7), lambda p: twins.fedavg(p, Sam(p, 0.1), 0.7)),
    "FedASAM": (lambda: algorithms.FedASAM(0.4, 0.3, 0.7), lambda p: twins.fedavg(p, Asam(p, 0.4, 0.3), 0.7)),
    "FedLESAM": (lambda: algorithms.FedLESAM(0.1, 0.7), lambda p: twins.fedavg(p, Lesam(p, 0.1), 0.7)),
    "FedLESAM_S": (lambda: algorithms.FedLESAM_S(0.1, 0.7), lambda p: twins.scaffold(p, Lesam(p, 0.1), 0.7)),
    "FedLESAM_D": (lambda: algorithms.FedLESAM_D(0.1, 0.3), lambda p: twins.feddyn(p, Lesam(p, 0.1), 0.3)),
    "FedACG": (lambda: algorithms.FedACG(0.6, 0.3), lambda p: newer.fedacg(p, Plain(p), 0.6, 0.3)),
    "FedExP": (lambda: algorithms.FedExP(1e-4), lambda p: newer.fedexp(p, Plain(p), 1e-4)),
    "QFedAvg": (lambda: algorithms.QFedAvg(1.7), lambda p: newer.qfedavg(p, Plain(p), 1.7)),
    "FedVARP": (lambda: algorithms.FedVARP(0.7), lambda p: newer.fedvarp(p, Plain(p), 0.7)),
    "FedInit": (lambda: algorithms.FedInit(0.3), lambda p: newer.fedinit(p, Plain(p), 0.3)),
    "FedNSAM": (lambda: algorithms.FedNSAM(0.1, 0.6), lambda p: newer.fedacg(p, Sam(p, 0.1), 0.6, 0.0)),
    "FedSWA": (lambda: algorithms.FedSWA(0.2, 1.3), lambda p: newer.fedswa(p, Plain(p), 0.2, 1.3)),
    "FedMoSWA": (lambda: algorithms.FedMoSWA(0.2, 0.4, 1.3), lambda p: newer.fedmoswa(p, Plain(p), 0.2, 1.3, 0.4)),
    "FedTOGA": (lambda: algorithms.FedTOGA(0.1, 0.3, 0.7, 0.5), lambda p: newer.fedtoga(p, 0.1, 0.3, 0.7, 0.5)),
    "FedWMSAM": (
        lambda: algorithms.FedWMSAM(0.1, 0.3, 0.4, 0.7),
        lambda p: newer.fedwmsam(p, 0.1, 0.3, 0.4, 0.7),
    ),
}

NETWORKS = {
    "MOON": (lambda: algorithms.MOON(2.0, 0.3), None, lambda: networks.moon(2.0, 0.3)),
    "FedNTD": (lambda: algorithms.FedNTD(2.0, 1.7), None, lambda: networks.fedntd(2.0, 1.7)),
    "FedAdamW": (
        lambda: algorithms.FedAdamW(0.3),
        partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1),
        lambda: networks.fedadamw(0.3, 0.05, 0.1),
    ),
    "FedMuon": (
        lambda: algorithms.FedMuon(0.3),
        partial(algorithms.fedmuon.Muon, lr=0.1, momentum=0.8, weight_decay=0.1, adamw_lr=0.05),
        lambda: networks.fedmuon(0.3, 0.1, 0.05, 0.8, 0.1),
    ),
}
"""Methods whose clients need a network: the algorithm, the optimizer, and the twin."""


SETTINGS = {
    "QFedAvg, q below 1": (lambda: algorithms.QFedAvg(0.4, 0.2), lambda p: newer.qfedavg(p, Plain(p), 0.4, 5.0)),
    "FedOpt, plain mean": (
        lambda: algorithms.FedOpt(partial(torch.optim.RMSprop, lr=0.05, alpha=0.9, eps=1e-3), weighted=False),
        lambda p: twins.fedopt(p, Plain(p), twins.rmsprop(0.05, 0.9, 1e-3), weighted=False),
    ),
    "FedAvgM, plain mean": (
        lambda: algorithms.FedAvgM(0.7, 0.9, weighted=False),
        lambda p: twins.fedopt(p, Plain(p), twins.sgd_momentum(0.7, 0.9), weighted=False),
    ),
    "FedAvgM, Nesterov": (
        lambda: algorithms.FedAvgM(0.7, 0.9, nesterov=True),
        lambda p: twins.fedopt(p, Plain(p), twins.sgd_momentum(0.7, 0.9, nesterov=True)),
    ),
    "FedAdam, plain mean": (
        lambda: algorithms.FedAdam(0.05, 0.8, 0.95, 0.01, weighted=False),
        lambda p: twins.fedopt(p, Plain(p), twins.adam(0.05, 0.8, 0.95, 0.01), weighted=False),
    ),
    "FedAdam, bias corrected": (
        lambda: algorithms.FedAdam(0.05, 0.8, 0.95, 0.01, bias_correction=True),
        lambda p: twins.fedopt(p, Plain(p), twins.adam(0.05, 0.8, 0.95, 0.01, corrected=True)),
    ),
    "FedYogi, plain mean": (
        lambda: algorithms.FedYogi(0.05, 0.8, 0.95, 0.01, weighted=False),
        lambda p: twins.fedopt(p, Plain(p), twins.yogi(0.05, 0.8, 0.95, 0.01, 0.0), weighted=False),
    ),
    "FedAdagrad, plain mean": (
        lambda: algorithms.FedAdagrad(0.05, 0.01, weighted=False),
        lambda p: twins.fedopt(p, Plain(p), twins.adagrad(0.05, 0.01, 0.0), weighted=False),
    ),
    "SCAFFOLD, equal": (
        lambda: algorithms.SCAFFOLD(0.7, weighting="equal"),
        lambda p: twins.scaffold(p, Plain(p), 0.7, equal=True),
    ),
    "FedDyn, equal": (
        lambda: algorithms.FedDyn(0.3, weighting="equal"),
        lambda p: twins.feddyn(p, Plain(p), 0.3, equal=True),
    ),
    "FedDC, equal": (
        lambda: algorithms.FedDC(0.3, weighting="equal"),
        lambda p: twins.feddc(p, Plain(p), 0.3, equal=True),
    ),
    "FedSpeed, equal": (
        lambda: algorithms.FedSpeed(0.1, 0.3, weighting="equal"),
        lambda p: twins.feddyn(p, Sam(p, 0.1), 0.3, equal=True),
    ),
    "FedSMOO, equal": (
        lambda: algorithms.FedSMOO(0.1, 0.3, weighting="equal"),
        lambda p: twins.feddyn(p, Dual(p, 0.1), 0.3, equal=True),
    ),
    "FedGAMMA, equal": (
        lambda: algorithms.FedGAMMA(0.1, 0.7, weighting="equal"),
        lambda p: twins.scaffold(p, Sam(p, 0.1), 0.7, equal=True),
    ),
    "FedLESAM_S, equal": (
        lambda: algorithms.FedLESAM_S(0.1, 0.7, weighting="equal"),
        lambda p: twins.scaffold(p, Lesam(p, 0.1), 0.7, equal=True),
    ),
    "FedLESAM_D, equal": (
        lambda: algorithms.FedLESAM_D(0.1, 0.3, weighting="equal"),
        lambda p: twins.feddyn(p, Lesam(p, 0.1), 0.3, equal=True),
    ),
    "FedTOGA, equal": (
        lambda: algorithms.FedTOGA(0.1, 0.3, 0.7, 0.5, weighting="equal"),
        lambda p: newer.fedtoga(p, 0.1, 0.3, 0.7, 0.5, equal=True),
    ),
    "FedNSAM, along the momentum": (
        lambda: algorithms.FedNSAM(0.1, 0.6, along="momentum"),
        lambda p: newer.fednsam_along_momentum(p, 0.6),
    ),
}

PERTURBATIONS = {
    "SAM": (lambda: SAM(0.1), lambda p: Sam(p, 0.1)),
    "ASAM": (lambda: ASAM(0.4, 0.3), lambda p: Asam(p, 0.4, 0.3)),
    "LESAM": (lambda: LESAM(0.1), lambda p: Lesam(p, 0.1)),
    "DualSAM": (lambda: DualSAM(0.1), lambda p: Dual(p, 0.1)),
}

SOURCES = {
    "Algorithm": "paper: McMahan 2017, alg. 1",
    "FedAvg": "paper: McMahan 2017, alg. 1; server_lr: Reddi 2021, alg. 1",
    "FedProx": "paper: Li 2020, eq. 2",
    "SCAFFOLD": "paper: Karimireddy 2020, alg. 1, option II; p_i is ours",
    "FedDyn": "paper: Acar 2021, alg. 1; alpha/p_i: the authors' code",
    "FedDC": "paper: Gao 2022, eq. 2-9; mean of all h, p_i: the authors' code",
    "SCAFFOLD, equal": "paper: Karimireddy 2020, alg. 1, option II",
    "FedDyn, equal": "paper: Acar 2021, alg. 1",
    "FedDC, equal": "paper: Gao 2022, eq. 2-9; mean of all h: the authors' code",
    "FedCM": "paper: Xu 2021, alg. 2",
    "FedSpeed": "code: the authors' FL-Simulator, which is FedDyn + SAM",
    "FedOpt": "paper: Reddi 2021, alg. 1; weights: Hsu 2019, sec. 3.3",
    "FedAvgM": "paper: Hsu 2019, sec. 3.3",
    "FedAdam": "paper: Reddi 2021, alg. 2",
    "FedAdam, bias corrected": "paper: Kingma 2015, alg. 1",
    "FedYogi": "paper: Zaheer 2018, alg. 2",
    "FedAdagrad": "paper: Duchi 2011; eps: Reddi 2021, alg. 2",
    "FedNova": "paper: Wang 2020, eq. 8, a_i = 1",
    "FedBN": "paper: Li 2021, alg. 1",
    "FedGAMMA": "paper: SCAFFOLD's, with SAM's gradients",
    "FedSMOO": "paper: Sun 2023, alg. 1; what is sent: the authors' code",
    "MoFedSAM": "paper: Qu 2022, alg. 2",
    "FedGloSS": "paper: Caldarola 2025, alg. 1",
    "FedSAM": "paper: Qu 2022, alg. 1",
    "FedASAM": "paper: Caldarola 2022; Kwon 2021, eq. 7",
    "FedLESAM": "paper: Fan 2024, eq. 10, alg. 1",
    "FedLESAM_S": "paper: Fan 2024, eq. 10, on SCAFFOLD",
    "FedLESAM_D": "paper: Fan 2024, eq. 10, on FedDyn",
    "FedACG": "code: the authors'; beta has the paper's factor 1/2",
    "FedExP": "code: the authors', in alg. 1's form",
    "QFedAvg": "paper: Li 2020, alg. 2; p_i as weights is ours",
    "FedVARP": "code: public code's statement of alg. 1",
    "FedInit": "code: the authors' FL-Simulator",
    "FedNSAM": "code: the authors' (FedSWA repository)",
    "FedNSAM, along the momentum": "code: the authors' (FedNSAM repository)",
    "FedSWA": "notes on the paper: alg. 1",
    "FedMoSWA": "notes on the paper: alg. 2, option II",
    "FedTOGA": "code: public code of unknown authors",
    "FedWMSAM": "the authors' README; alpha, c: their code",
    "MOON": "code: the authors'; a first training has no term",
    "FedNTD": "code: the authors'",
    "FedAdamW": "notes on the paper; one count of steps: the authors' code",
    "FedMuon": "notes on the paper; vectors by AdamW: the authors' code",
    "SAM": "paper: Foret 2021, eq. 2",
    "ASAM": "paper: Kwon 2021, eq. 7",
    "LESAM": "paper: Fan 2024, eq. 10",
    "DualSAM": "paper: Sun 2023, alg. 1; what is sent: the authors' code",
}
"""What each twin was written from; a setting that is not named is written from what its method is."""


def comparisons():
    """All comparisons by name: an algorithm and a perturbation to train with, and the twin."""
    plain = {name: (make(), None, twin) for name, (make, twin) in {**CASES, **SETTINGS}.items()}
    plain |= {
        name: (None, make(), lambda p, oracle=oracle: twins.fedavg(p, oracle(p)))
        for name, (make, oracle) in PERTURBATIONS.items()
    }
    return plain | {name: (make(), None, lambda p, twin=twin: twin()) for name, (make, _, twin) in NETWORKS.items()}


def problem(name):
    """What a comparison is made on, and its number of rounds; see `fitted.longer` and `networks`."""
    return ("a network", len(networks.ROUNDS)) if name in NETWORKS else ("5 quadratics", len(longer().rounds))


def source(name):
    """What the twin of a comparison was written from."""
    return SOURCES.get(name) or SOURCES[name.split(",")[0]]


def compare(name, tolerance, engine="eager"):
    """Train and play the twin: a row of the table."""
    (algorithm, perturbation, twin), (kind, rounds) = comparisons()[name], problem(name)
    if algorithm is not None and algorithm.optimizer_state:
        engine = "eager"  # no other has an optimizer's state sent
    settings = {"engine": engine, "accelerator": "gpu" if engine == "cuda_graph" else "cpu"}
    if name in NETWORKS:
        models = fit_network(algorithm, NETWORKS[name][1], **settings)
    else:
        models = fit(longer(), algorithm, perturbation, **settings)
    expected = np.array(twin(longer()))
    error = float(np.abs(np.array(models) - expected).max() / np.abs(expected).max())
    return {"method": name, "twin": source(name), "problem": kind, "rounds": rounds,
            "error": error, "ok": error <= tolerance}  # fmt: skip

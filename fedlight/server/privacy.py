"""Client-level differential privacy in the sums of a round, and its ledger."""

import logging
import math
import os
import secrets
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor

from fedlight.algorithms.base import Algorithm
from fedlight.checks import current
from fedlight.seeding import generator
from fedlight.server.sampling import Bernoulli, Sampler, Uniform
from fedlight.transforms.base import Transform
from fedlight.transforms.differential_privacy import DifferentialPrivacy

_KEY = "trainer.transforms"
_MOVES = (
    "model: training moves {}, which DifferentialPrivacy does not bound. Use GroupNorm instead of BatchNorm, or"
    " track_running_stats=False; leave out what else moves without a gradient."
)
_MOST = 1e4
_WITHIN = "privacy/within"


class Privacy:
    """Bounds updates, draws the noise of a round, and knows what the rounds have spent.

    The ``ledger`` is that of the checkpoint that is continued. Sums are divided by the number ``clients`` that the
    sampler, which is set up, is expected to draw. From the ``seed`` is noise that can be repeated.
    """

    def __init__(self, ledger: Any, settings: DifferentialPrivacy, sampler: Sampler, rounds: int, seed: int) -> None:
        self.settings, self._seed, self.clients = settings, seed, sampler.clients_per_round
        n, poisson = len(sampler.candidates), isinstance(sampler, Bernoulli)
        delta = n**-1.1 if settings.delta is None else settings.delta
        pld, name = settings.accountant == "pld", type(sampler).__name__
        _refuse(
            (settings.noise_multiplier is None and settings.epsilon is None)
            and f"{_KEY}: DifferentialPrivacy needs noise_multiplier or epsilon. Set one.",
            (n < 2 or delta * n >= 1) and f"{_KEY}.delta={delta:g} must be below 1/N; N={n} clients, at least 2.",
            (type(sampler) not in (Bernoulli, Uniform) or (pld and not poisson))
            and f"trainer.sampler: {settings.accountant} accounts for no {name}. Use Bernoulli, or Uniform with rdp.",
            getattr(sampler, "redraw", False)
            and "trainer.sampler.redraw: no accountant covers rounds that are drawn again. Set it to false.",
        )
        held = {k: v for k, v in vars(settings).items() if not k.startswith("clip")}  # noise is in multiples of it
        self._held = held | {"delta": delta, "clients_per_round": self.clients, "of": n, "sampler": name}
        changed = [k for k, v in self._held.items() if ledger is not None and v != ledger["settings"].get(k)]
        _refuse(changed and f"ckpt_path: its rounds had another {changed} in their ledger. Set it back, or start anew.")
        self.noise: Any = settings.noise_multiplier if ledger is None else ledger["noise_multiplier"]
        parts = self.clients, n, poisson, delta, settings.accountant
        if self.noise is None:
            self.noise = _least_noise(settings.epsilon or 0, rounds, *parts)
        self.epsilon = cache(_accounted(self.noise, *parts))  # a round asks twice for the next one's
        self._adapted, self._scales = (ledger or {}).get("clip", settings.clip), [self.noise]
        if settings.quantile is not None:  # of the updates, in multiples of the bound, and of the count
            count = max(self.clients / 20, self.noise)
            self._scales = [self.noise and (self.noise**-2 - (2 * count) ** -2) ** -0.5, self.noise and count]

    @property
    def clip(self) -> float:
        """The bound of the round."""
        return float(current(self.settings.clip) if self.settings.quantile is None else self._adapted)

    def bound(self, update: Tensor, moved: Sequence[str]) -> dict[str, Tensor]:
        """Shorten an update ``[P]`` float64, in place; refuse buffers that moved with it. What is summed beside it."""
        _refuse(moved and _MOVES.format(", ".join(moved[:3])))
        shrink = self.clip / torch.linalg.vector_norm(update)  # infinite where the update is 0
        update.mul_(shrink.clamp(max=1.0))
        return {} if self.settings.quantile is None else {_WITHIN: torch.where(shrink >= 1, 0.5, -0.5).double()}

    def draw(self, round: int, params: Tensor) -> dict[str, Tensor]:
        """The noise of a round in float64: ``[P]`` of the updates, and of how many were within the bound."""
        size, (scale, *count) = len(params) + len(self._scales) - 1, self._scales
        if self.settings.secure:
            bits = torch.frombuffer(bytearray(os.urandom(8 * size)), dtype=torch.int64).bitwise_and(2**53 - 1)
            normal: Tensor = torch.special.ndtri((bits.double() + 0.5) * 2.0**-53)
        else:
            normal = torch.randn(size, generator=generator(self._seed, "privacy", round), dtype=torch.float64)
        normal = normal.to(params.device)
        noise = {"update": normal[: len(params)] * (scale * self.clip)}
        return noise | ({_WITHIN: normal[-1] * count[0]} if count else {})

    def finish(self, rounds: int, total: Mapping[str, Tensor]) -> dict[str, float]:
        """The figures of a round, so many having been made; let the bound follow the sums."""
        if self.settings.quantile is None:
            return {"privacy/epsilon": self.epsilon(rounds)}
        figures = {"privacy/epsilon": self.epsilon(rounds), "privacy/clip": self.clip}
        within = float(total[_WITHIN]) / self.clients + 0.5
        self._adapted *= math.exp(-current(self.settings.clip_lr) * (within - self.settings.quantile))
        return figures

    def spent(self, rounds: int) -> bool:
        """Whether one round more than these would exceed the target."""
        return self.settings.epsilon is not None and self.epsilon(rounds + 1) > self.settings.epsilon

    def state_dict(self, rounds: int) -> dict[str, Any]:
        """The ledger: so many rounds, all of them alike."""
        return {"settings": self._held, "noise_multiplier": self.noise, "rounds": rounds, "clip": self.clip}

    def phrase(self, rounds: int, views: Sequence[str]) -> str:
        """What is promised when so many rounds are over, or the target is spent before, and what is not."""
        last = bisect_left(range(rounds), True, key=self.spent)
        secret = "" if self.settings.secure else ", from the seed"
        end = ", the last that epsilon allows" if last < rounds else ""
        whom = "adding or removing" if self._held["sampler"] == "Bernoulli" else "replacing"
        return (
            f"ε = {self.epsilon(max(1, last)):.4g}, δ = {self._held['delta']:.3g} for {whom} a client, after {last}"
            f" rounds{end}; noise {self._scales[0]:.4g} x clip {self.clip:.4g}{secret}."
            f" Not private: train/*, clients/*, {'view all, ' * ('all' in views)}clients.csv, pictures of partition and"
            " clients, what checkpoints keep of clients"
        )


def sampling_seed(privacy: Privacy | None, fabric: Fabric, seed: int) -> int:
    """The seed by which clients are drawn, the same in every process: one that nobody knows where it must be so."""
    return int(fabric.broadcast(secrets.randbits(63))) if privacy and privacy.settings.secure else seed


def begin_privacy(
    transforms: Sequence[Transform], module: LightningModule, algorithm: Algorithm, checkpoint: Any, *rest: Any
) -> Privacy | None:
    """What the transforms ask for, as the checkpoint's rounds had it; None without DifferentialPrivacy.

    Raises:
        MisconfigurationException: for what would not be private, or differs from the checkpoint's run.
    """
    found, ledger = [t for t in transforms if isinstance(t, DifferentialPrivacy)], (checkpoint or {}).get("privacy")
    norms = [name for name, m in module.named_modules() if getattr(m, "running_mean", None) is not None]
    _refuse(
        (checkpoint and bool(found) != bool(ledger))
        and f"ckpt_path: its rounds had {'' if ledger else 'no '}DifferentialPrivacy. Set {_KEY} back, or start anew.",
        len(found) > 1 and f"{_KEY} holds DifferentialPrivacy twice. Leave one.",
        (found and not algorithm.sums_updates)
        and f"{_KEY}: DifferentialPrivacy bounds the sum of the updates, and {type(algorithm).__name__} makes more than"
        " that of what clients send. Use another, as FedAvg, FedProx, FedDyn, FedOpt.",
        (found and norms) and _MOVES.format(", ".join(norms[:3])),
    )
    return Privacy(ledger, found[0], *rest) if found else None


def _refuse(*reasons: Any) -> None:
    for reason in filter(None, reasons):
        raise MisconfigurationException(reason)


def _accounted(noise: float, k: int, n: int, poisson: bool, delta: float, accountant: str) -> Callable[[int], float]:
    """ε by the number of rounds with this noise multiplier."""
    try:
        import dp_accounting as dp
        from dp_accounting import pld, rdp
    except ImportError as error:
        raise MisconfigurationException(f"{_KEY}: run pip install 'fedlight[privacy]' for the accounting.") from error
    if noise == 0:
        return lambda rounds: math.inf
    if accountant == "pld":
        step = pld.privacy_loss_distribution.from_gaussian_mechanism(noise, sampling_prob=k / n)
        return lambda rounds: float(step.self_compose(rounds).get_epsilon_for_delta(delta))
    gaussian = dp.GaussianDpEvent(noise if poisson else noise / 2)  # one for another changes the sum by twice the bound
    without = dp.SampledWithoutReplacementDpEvent(n, k, gaussian)
    event = dp.PoissonSampledDpEvent(k / n, gaussian) if poisson else without
    logging.getLogger("absl").setLevel(logging.ERROR)  # it names the orders that it leaves out
    relation = dp.NeighboringRelation.ADD_OR_REMOVE_ONE if poisson else dp.NeighboringRelation.REPLACE_ONE
    one = rdp.RdpAccountant(neighboring_relation=relation).compose(event)
    # Rényi divergences add up; to compose anew would take tenths of a second in each round.
    return lambda rounds: float(rdp.compute_epsilon(one._orders, rounds * one._rdp, delta)[0])


def _least_noise(epsilon: float, rounds: int, *parts: Any) -> float:
    """The noise multiplier with which so many rounds spend ε, and not more."""
    from scipy.optimize import brentq

    def excess(log_noise: float, *parts: Any) -> float:
        return math.log(max(1e-12, _accounted(math.exp(log_noise), *parts)(max(1, rounds))) / epsilon)

    low, high, rdp = math.log(0.3), math.log(_MOST), (*parts[:-1], "rdp")
    least = epsilon * math.exp(excess(high, *rdp))
    _refuse(
        least > epsilon
        and f"{_KEY}.epsilon={epsilon:g} is out of reach: {rounds} rounds with noise_multiplier={_MOST:g} spend"
        f" {least:.3g}. Raise it or delta, or lower trainer.max_rounds or trainer.clients_per_round."
    )
    found = low if excess(low, *rdp) <= 0 else float(brentq(excess, low, high, args=rdp, xtol=1e-4))
    if parts[-1] == "pld" and excess(found - 0.7, *parts) > 0:  # which needs less, and is slow where there is little
        found = float(brentq(excess, found - 0.7, found, args=parts, xtol=1e-4))
    while excess(found, *parts) > 0:
        found += 1e-4
    return math.exp(found)

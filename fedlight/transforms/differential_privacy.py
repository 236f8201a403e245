"""DifferentialPrivacy."""

from typing import Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.checks import Number, check_hyperparameter, check_number
from fedlight.transforms.base import Transform


class DifferentialPrivacy(Transform):
    """Hide whether a client took part: bound each update, and add Gaussian noise to the sum of the round.

    The server, which is trusted, takes Σ_i Δ_i·min(1, clip/‖Δ_i‖₂) + N(0, (noise_multiplier·clip)²·I) and divides it by
    the K clients that are expected, all of one weight. Updates are bounded in float64, after all other transforms.
    ``privacy/epsilon`` is what dp-accounting (extra ``privacy``) says of the rounds so far: with ``Bernoulli`` sampling
    for adding or removing a client, with ``Uniform`` for replacing one, which changes the sum by up to 2·clip.

    Args:
        clip: the bound of an update's norm.
        noise_multiplier: standard deviation of the noise in multiples of ``clip``; 0 only bounds, and ε is infinite.
        epsilon: instead: the noise with which ``trainer.max_rounds`` rounds spend this; a run stops before it has
            spent more.
        delta: δ, below 1/N; by default N^-1.1.
        accountant: ``rdp`` for Rényi accounting, or ``pld``, which is tighter and takes ``Bernoulli`` only.
        secure: draw noise and clients from the operating system's generator; such a run cannot be repeated.
        quantile: let the bound follow this quantile γ of the updates' norms, from ``clip`` on: after each round C ←
            C·exp(−clip_lr·(b − γ)), b being the part of the clients within the bound, with noise of max(K/20,
            noise_multiplier) on their number. That of the updates is (noise_multiplier⁻² − (2·this)⁻²)^(−1/2) then, so
            that ε is the same.
        clip_lr: how fast.

    Source: McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018, algorithm 1 with its
    first estimator; for rounds of fixed size Wang et al., "Subsampled Rényi Differential Privacy and Analytical Moments
    Accountant", AISTATS 2019; the quantile: Andrew et al., "Differentially Private Learning with Adaptive Clipping",
    NeurIPS 2021, algorithm 1, where the count's noise is K/20.
    """

    stage = 3
    update_only = True

    def __init__(
        self,
        clip: Number = 1.0,
        noise_multiplier: float | None = None,
        epsilon: float | None = None,
        delta: float | None = None,
        accountant: Literal["rdp", "pld"] = "rdp",
        secure: bool = False,
        quantile: float | None = None,
        clip_lr: Number = 0.2,
    ) -> None:
        key = "trainer.transforms"
        if not clip:
            raise MisconfigurationException(f"{key}.clip={clip!r}: noise hides nothing unless updates are bounded.")
        if noise_multiplier is not None and epsilon is not None:
            raise MisconfigurationException(f"{key}.noise_multiplier and {key}.epsilon exclude each other; set one.")
        if accountant not in ("rdp", "pld"):
            raise MisconfigurationException(f"{key}.accountant={accountant!r} must be 'rdp' or 'pld'.")
        self.clip = check_hyperparameter(f"{key}.clip", clip, positive=True, at_most=1e5)
        check_number(f"{key}.noise_multiplier", noise_multiplier or 0, at_most=1e4)
        check_number(f"{key}.epsilon", 1.0 if epsilon is None else epsilon, positive=True)
        check_number(f"{key}.delta", 0.5 if delta is None else delta, positive=True, below=1)
        check_number(f"{key}.quantile", 0.5 if quantile is None else quantile, positive=True, below=1)
        if quantile is not None and not isinstance(self.clip, float):
            raise MisconfigurationException(f"{key}.clip follows a schedule or a quantile. Leave one of them.")
        self.quantile, self.clip_lr = quantile, check_hyperparameter(f"{key}.clip_lr", clip_lr, positive=True)
        self.noise_multiplier, self.epsilon, self.delta = noise_multiplier, epsilon, delta
        self.accountant, self.secure = accountant, secure

"""Callbacks: penalties on the training loss, and what is measured while it trains."""

from fedlight.callbacks.client_metrics import ClientMetrics
from fedlight.callbacks.hessian import HessianSpectrum
from fedlight.callbacks.landscape import LossLandscape
from fedlight.penalties.base import PenalizedStep, Penalty, penalized_step
from fedlight.penalties.man import MAN

__all__ = ["MAN", "ClientMetrics", "HessianSpectrum", "LossLandscape", "Penalty", "PenalizedStep", "penalized_step"]

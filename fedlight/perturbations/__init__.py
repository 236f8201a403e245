"""Perturbations. Every module of this package is imported: a new file is a new perturbation."""

from fedlight.perturbations.base import Perturbation
from fedlight.plugins import offer

__all__, __getattr__ = offer(__name__, Perturbation, "perturbation")

"""Federated algorithms. Every module of this package is imported: a new file is a new algorithm."""

from fedlight.algorithms.base import Algorithm, Message
from fedlight.plugins import offer

__all__, __getattr__ = offer(__name__, Algorithm, "algorithm")
__all__ += ["Message"]

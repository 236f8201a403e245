"""Personal models. Every module of this package is imported: a new file is a new method."""

from fedlight.personal.base import Personalization
from fedlight.plugins import offer

__all__, __getattr__ = offer(__name__, Personalization, "personalization")

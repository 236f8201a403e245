"""Transforms of messages. Every module of this package is imported: a new file is a new transform."""

from fedlight.plugins import offer
from fedlight.transforms.base import Transform

__all__, __getattr__ = offer(__name__, Transform, "transform")

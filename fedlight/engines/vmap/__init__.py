"""The engine that trains the clients of a round side by side, as one program."""

from fedlight.engines.vmap.engine import Vmap

__all__ = ["Vmap"]

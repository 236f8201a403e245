"""The command line. What needs no torch is answered without it, so nothing is loaded here before it is asked for."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("FederatedArgumentParser", "FederatedCLI", "main"):
        return getattr(importlib.import_module("fedlight.cli.command"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

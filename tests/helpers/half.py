"""16-mixed on the CPU."""

from typing import Any

import pytest
import torch
from lightning.fabric.plugins.precision import MixedPrecision

from fedlight.run import setup


class OnCPU(MixedPrecision):
    """16-mixed with a gradient scaler on the CPU, where Fabric itself would give none."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers whose precision is 16-mixed with a scaler."""
    plain = setup.make_fabric

    def with_scaler(settings: dict[str, Any]) -> Any:
        fabric = plain(settings)
        fabric._strategy._precision = fabric._precision = OnCPU()
        return fabric

    monkeypatch.setattr(setup, "make_fabric", with_scaler)

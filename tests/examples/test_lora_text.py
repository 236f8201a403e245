"""The example of LoRA: adapters alone are trained and sent, with MAN and SAM, also side by side in one program."""

import importlib.util
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "examples" / "lora_text.py"


@pytest.fixture(scope="module")
def example():
    for package in ("transformers", "peft"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install transformers peft")
    spec = importlib.util.spec_from_file_location("lora_text", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore:There is a performance drop")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*does not have many workers")
@pytest.mark.parametrize("engine", ["eager", "vmap"])
def test_adapters_cross_and_the_base_stays(tmp_path, example, engine):
    torch.manual_seed(0)
    module = example.LoraClassifier()
    base = {n: (p.data_ptr(), p.detach().clone()) for n, p in module.named_parameters() if not p.requires_grad}
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained == 2 * 2 * 4 * (64 + 64) + 64 * 2 + 2  # two layers, query and value, A and B; the head
    settings = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "default_root_dir": tmp_path}
    trainer = example.fit(module, tmp_path, engine=engine, max_rounds=1, local_epochs=1, **settings)
    found = trainer.callback_metrics
    assert float(found["comm/up_mb"]) == float(found["comm/down_mb"]) == pytest.approx(4 * 4 * trained / 1e6)
    assert sum(name.startswith("man/") for name in found) == 3
    for name, parameter in module.named_parameters():
        if name in base:
            assert parameter.data_ptr() == base[name][0]
            assert torch.equal(parameter, base[name][1])

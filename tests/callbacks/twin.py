"""MAN and HessianSpectrum in the Trainer and the CLI of pytorch_lightning. Run as a script; prints "twin agrees"."""

# ruff: noqa: I001  fedlight first, as in a project that sorts its imports
import importlib
import sys

import fedlight.callbacks as early
import pytorch_lightning as twin
import torch
from pytorch_lightning.cli import LightningCLI

from tests.callbacks.nets import Batches, Lit, batches, formula, gradient, is_untouched, silent_trainer

ZETA = 0.7


class TwinLit(twin.LightningModule):
    """The small network as a module of the other package."""

    training_step, configure_optimizers, forward = Lit.training_step, Lit.configure_optimizers, Lit.forward

    def __init__(self):
        super().__init__()
        self.lr, self.net = 0.1, Lit().net

    def train_dataloader(self):
        return Batches(batches(1))


class Recorder(twin.Callback):
    """Keeps the gradients of the latest optimizer step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = [p.grad.clone() for p in pl_module.parameters()]


def check(recorder: Recorder, trainer: twin.Trainer, module: TwinLit) -> None:
    reference = Lit()
    expected = gradient(formula(reference, batches(1)[0], ZETA), reference)
    for a, b in zip(recorder.gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    assert trainer.callback_metrics.keys() == {"train/penalty", "man/net.relu", "man/net.tanh"}
    assert is_untouched(module)


def main() -> None:
    recorder, module = Recorder(), TwinLit()
    callbacks = early.MAN(ZETA), early.MAN(0.0), recorder
    trainer = silent_trainer(*callbacks, trainer_class=twin.Trainer)
    trainer.fit(module)
    check(recorder, trainer, module)

    spectrum = early.HessianSpectrum(every_n_rounds=1, density=False, trace=False)
    module.train_dataloader = lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batches(1)[0]), 4)
    silent_trainer(spectrum, trainer_class=twin.Trainer).fit(module)
    alone = early.HessianSpectrum(every_n_rounds=1, density=False, trace=False)
    one = Lit(lr=0.0)
    one.load_state_dict(module.state_dict())
    silent_trainer(alone).fit(one, module.train_dataloader())
    assert abs(spectrum.results["server"].lambda_max / alone.results["server"].lambda_max - 1) < 1e-5

    # The CLI asks for a subclass of its own Callback: MAN is one where pytorch_lightning was imported first.
    for name in [name for name in sys.modules if name.startswith("fedlight")]:
        del sys.modules[name]
    late = importlib.import_module("fedlight.callbacks")
    for callback in (late.MAN, late.HessianSpectrum, late.LossLandscape):
        assert issubclass(callback, twin.Callback)
    recorder = Recorder()
    arguments = ["fit", "--trainer.callbacks+=fedlight.callbacks.MAN", f"--trainer.callbacks.zeta={ZETA}"]
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    cli = LightningCLI(
        TwinLit, args=arguments, trainer_defaults=defaults | {"callbacks": recorder}, save_config_callback=None
    )
    check(recorder, cli.trainer, cli.model)
    print("twin agrees")


if __name__ == "__main__":
    main()

"""Two processes under DDP: each has half of every batch. Run as a script; prints "gradients agree" from rank 0."""

import torch
from lightning.pytorch.strategies import DDPStrategy

from fedlight.callbacks import MAN
from tests.callbacks.nets import Batches, Lit, Recorder, batches, formula, gradient, silent_trainer

ZETA = 0.7


class Shared(Lit):
    """Takes its rank's half of a batch."""

    def training_step(self, batch, batch_idx):
        half = [part[self.global_rank :: 2] for part in batch]
        return super().training_step(half, batch_idx)


class Branching(Lit):
    """Rank 0 calls relu, and rank 1 tanh."""

    def forward(self, x):
        h = self.net.fc1(x)
        h = self.net.tanh(h) if self.global_rank else self.net.relu(h)
        return self.net.fc3(self.net.fc2(h))


def check_layers_of_one_rank() -> None:
    data = batches(2)
    trainer = silent_trainer(MAN(ZETA), devices=2, strategy=DDPStrategy(process_group_backend="gloo"))
    trainer.fit(Branching(lr=0.0), Batches(data))
    net, metrics = Lit().net, trainer.callback_metrics
    for name, act in (("relu", torch.relu), ("tanh", torch.tanh)):
        expected = torch.stack([act(net.fc1(x)).square().mean() for x, _ in data]).mean()
        torch.testing.assert_close(metrics[f"man/net.{name}"].item(), expected.item(), rtol=1e-6, atol=0)


def main() -> None:
    check_layers_of_one_rank()
    recorder, data = Recorder(), batches(2)
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = silent_trainer(MAN(ZETA), recorder, devices=2, strategy=strategy)
    trainer.fit(Shared(), Batches(data))
    if trainer.global_rank != 0:
        return
    twin, penalties = Lit(), []
    for ours, batch in zip(recorder.gradients, data, strict=True):
        loss = formula(twin, batch, ZETA)
        penalties.append((loss - formula(twin, batch, 0)).item())
        expected = gradient(loss, twin)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
        with torch.no_grad():
            for p, g in zip(twin.parameters(), expected, strict=True):
                p.sub_(twin.lr * g)
    # What is logged is the mean over the ranks.
    reported = trainer.callback_metrics["train/penalty"]
    torch.testing.assert_close(reported.item(), sum(penalties) / 2, rtol=1e-6, atol=0)
    print("gradients agree")


if __name__ == "__main__":
    main()

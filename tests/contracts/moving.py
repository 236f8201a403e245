"""Modules whose steps move more than their trained parameters, on the problem of the contracts.

Run as a program (``python -m tests.contracts.moving FOLDER``, in two processes) it trains each and saves what came out.
"""

import copy
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from fedlight.trainer import FederatedTrainer
from tests.contracts.combinations import ROUNDS, Clients, Listed, Logistic, outcome


class Teacher(Logistic):
    """A momentum teacher: what it says depends on all steps before."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.logits).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch) + F.mse_loss(self.logits(batch[0]), self.teacher(batch[0]))
        self.move()
        return loss

    def move(self):
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.logits.parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)


class DataTeacher(Teacher):
    """Moved by ``.data``, of which torch keeps no count."""

    def move(self):
        for slow, fast in zip(self.teacher.parameters(), self.logits.parameters(), strict=True):
            slow.data.mul_(0.9).add_(fast.data, alpha=0.1)


class ReboundTeacher(Teacher):
    """Its storage is replaced in every step."""

    def move(self):
        for slow, fast in zip(self.teacher.parameters(), self.logits.parameters(), strict=True):
            slow.data = slow.data * 0.9 + fast.data * 0.1


class HookTeacher(Teacher):
    """Moved in a hook after the step."""

    def move(self):
        pass

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().move()


class LateTeacher(Teacher):
    """Rests in the first round."""

    def move(self):
        if self.current_epoch > 0:
            super().move()


class Hidden(Logistic):
    """A state that goes from batch to batch."""

    hidden = None

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch)
        before = 0.0 if self.hidden is None else self.hidden
        self.hidden = before * 0.5 + loss.detach()
        return loss * (1 + self.hidden)


class Outputs(Logistic):
    """A list that grows."""

    def __init__(self):
        super().__init__()
        self.outputs = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch)
        self.outputs.append(loss.detach())
        return loss * len(self.outputs)


class Counter(Logistic):
    """A schedule that counts steps."""

    steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch) / self.steps


class Queue(Logistic):
    """A queue of features in a buffer, which each step replaces by a new tensor."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(6, 3))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long), persistent=False)

    def training_step(self, batch, batch_idx):
        logits = self.logits(batch[0])
        loss = super().training_step(batch) + (logits.mean(0) - self.queue.mean(0)).square().mean()
        self.queue = torch.cat([logits.detach(), self.queue])[:6]
        self.filled += len(logits)
        return loss


_ALL = (Teacher, DataTeacher, ReboundTeacher, HookTeacher, LateTeacher, Hidden, Outputs, Counter, Queue)
MODULES = {module.__name__: module for module in _ALL}


def run(name, root, ckpt_path=None, rounds=ROUNDS, **settings):
    """Train a module; the trainer, the module, and what the server knows."""
    module = MODULES.get(name, name)()
    defaults = {
        "engine": "eager",
        "accelerator": "cpu",
        "devices": 1,
        "max_rounds": len(rounds),
        "sampler": Listed(*rounds),
    }
    quiet = {"enable_progress_bar": False, "client_val_every_n_rounds": 0, "default_root_dir": root, "name": str(name)}
    trainer = FederatedTrainer(**{**defaults, **quiet, "clients_per_round": 1, **settings})
    trainer.fit(module, Clients(), ckpt_path=ckpt_path)
    return trainer, module, outcome(trainer)


if __name__ == "__main__":
    found = {name: run(name, Path(sys.argv[1]), devices=2, enable_checkpointing=False)[2] for name in MODULES}
    torch.save(found, Path(sys.argv[1]) / f"rank{torch.distributed.get_rank()}.pt")

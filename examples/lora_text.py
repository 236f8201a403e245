"""Federate a transformer with LoRA: clients train and send adapters, and the frozen base is there once.

pip install transformers peft
python examples/lora_text.py

The model is made from a configuration, so that nothing is downloaded. With pretrained weights, in place of the config:
`BertForSequenceClassification.from_pretrained(..., problem_type="single_label_classification")`.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from fedlight import MAN, FederatedTrainer
from fedlight.algorithms import FedDyn
from fedlight.data import TextData
from fedlight.perturbations import SAM

VOCAB, LENGTH = 512, 16


class LoraClassifier(LightningModule):
    """A transformer whose attention has adapters of rank 4; only these and the head are trained."""

    def __init__(self, lr: float = 0.5) -> None:
        super().__init__()
        self.lr = lr
        base = BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCAB,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=128,
                max_position_embeddings=LENGTH,
                num_labels=2,
                attn_implementation="eager",
                problem_type="single_label_classification",  # or the first step would look and note it
            )
        )
        adapters = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"])
        self.net = get_peft_model(base, adapters)

    def forward(self, batch: dict[str, Tensor]) -> Any:
        # Of two dimensions a mask is looked at, whether it is all ones, which no recorded step can do.
        hidden = 1.0 - batch["attention_mask"][:, None, None].float()
        return self.net(batch["input_ids"], attention_mask=hidden * -1e9, labels=batch["labels"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self(batch).loss
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        out = self(batch)
        accuracy = (out.logits.argmax(1) == batch["labels"]).float().mean()
        self.log_dict({"val/loss": out.loss, "val/accuracy": accuracy}, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def write_reviews(path: Path, clients: int = 8, each: int = 40) -> str:
    """Made-up reviews, of which every client writes about things of its own; whether they are good is to be found."""
    rng, rows = random.Random(0), []
    words = {"good": ["great", "lovely", "fine", "superb"], "bad": ["poor", "awful", "dull", "broken"]}
    for client in range(clients):
        for i in range(each):
            label = ("good", "bad")[i % 2]
            text = f"this {rng.choice('abcdefgh')}{client} is {rng.choice(words[label])} and number {rng.randrange(9)}"
            rows.append({"text": text, "label": label, "client": f"client{client}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def fit(model: LightningModule, folder: Path, **settings: Any) -> FederatedTrainer:
    """Train FedDyn with SAM and MAN, all of which see the adapters alone."""
    data = TextData(
        write_reviews(folder / "reviews.jsonl"), client="client", tokenizer="hash", vocab_size=VOCAB, max_length=LENGTH,
        as_dict=True, batch_size=8,
    )  # fmt: skip
    defaults = {
        "max_rounds": 10,
        "clients_per_round": 4,
        "local_epochs": 2,
        "buffers": "reset",  # the base's are constants, as the numbers of positions: nobody sends them
        "name": "lora_text",
    }
    trainer = FederatedTrainer(
        algorithm=FedDyn(alpha=0.01), perturbation=SAM(rho=0.05), callbacks=[MAN(zeta=0.01)], **{**defaults, **settings}
    )
    trainer.fit(model, data)
    return trainer


if __name__ == "__main__":
    torch.manual_seed(0)
    model, folder = LoraClassifier(), Path("data")
    folder.mkdir(exist_ok=True)
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (True, False))
    trainer = fit(model, folder)
    found = trainer.callback_metrics
    print(f"{trained:,} of {total:,} parameters are trained: {4 * trained / 1e6:.3f} MB to a client and back")
    print({k: round(float(v), 4) for k, v in found.items() if k.startswith(("val/", "comm/", "man/"))})

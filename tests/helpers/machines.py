"""One of two machines, each with a process and a folder of its own.

``torchrun --nnodes 2 --node_rank R ... -m tests.helpers.machines ROOT STATE (whole|killed|resumed) OUT`` trains; the
second machine, its launcher and its process, is ``killed`` in the fourth round.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from fedlight.algorithms import FedDyn
from fedlight.callbacks.checkpoint import Checkpoint
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights

SIZES = (6, 12, 8, 3, 7)


class PowerCut(Callback):
    """Takes the second machine away, in the midst of a client's training."""

    def on_client_start(self, trainer: Any, pl_module: Any, client: int) -> None:
        if trainer.global_rank == 1 and trainer.current_round == 3:
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def train(root: Path, client_state: str, how: str, machines: int) -> dict[str, Any]:
    """Six rounds of FedDyn with view `all`; the weights, and the rows that are kept here."""
    callbacks = [Checkpoint(max_overhead=1), *([PowerCut()] if how == "killed" else [])]
    settings = {"max_rounds": 6, "clients_per_round": 3, "client_state": client_state, "num_nodes": machines}
    trainer = quiet_trainer(root, algorithm=FedDyn(0.1), callbacks=callbacks, **settings)
    model = Regression()
    trainer.fit(model, Clients(SIZES), ckpt_path="last" if how == "resumed" else None)
    federation = trainer._session.federation
    rows = {i: {part: federation.store.get(i, part) for part in ("algorithm", "latest")} for i in range(len(SIZES))}
    kept = {f"{i}/{p}/{k}": v for i, row in rows.items() for p, s in row.items() if s for k, v in s.items()}
    return {"weights": weights(model), "all": federation.state.views["all"], "rows": kept}


if __name__ == "__main__":
    root, client_state, how, out = sys.argv[1:]
    torch.set_num_threads(1)
    torch.save(train(Path(root), client_state, how, 2), Path(out) / f"{how}{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()

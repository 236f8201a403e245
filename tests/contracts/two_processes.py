"""Run by torchrun in two processes: trains combinations and saves the outcomes, one process group for all.

Usage: torchrun --nproc_per_node 2 two_processes.py FOLDER [NAME ...]
"""

import sys
import tempfile
from pathlib import Path

import torch

from tests.contracts.combinations import combinations, outcome, run


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    outcomes = {}
    for combination in (c for c in combinations() if not names or str(c) in names):
        trainer, _, _ = run(combination, folder / "runs", devices=2)
        assert trainer.world_size == 2
        outcomes[str(combination)] = outcome(trainer)
    torch.save(outcomes, folder / f"rank{trainer.global_rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()), sys.argv[2:])

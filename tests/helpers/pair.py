"""One program in two processes, and what each of them has saved."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).parents[2]


def in_pair(module: str, folder: Path, *words: str) -> list[Any]:
    """Run ``python -m module folder words`` by torchrun in two processes of a thread each; their ``rank<i>.pt``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", module, str(folder), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]

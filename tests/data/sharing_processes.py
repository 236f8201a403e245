"""What two processes hold after they have shared their data: run by ``tests/data/test_sharing.py``."""

import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch.utils.data import Subset, TensorDataset

from fedlight.data.arrays import ArrayDataset, in_memory
from fedlight.data.datamodule import FederatedDataModule, share_among_processes


class Data(FederatedDataModule):
    """Clients and validation of one storage, a test set of another; types that need alignment."""

    def __init__(self, odd: int = 7) -> None:
        super().__init__()
        self.num_clients = 2
        rng = torch.Generator().manual_seed(0)
        self.all = ArrayDataset(torch.randint(0, 256, (odd, 3), dtype=torch.uint8, generator=rng), torch.arange(odd))
        x = torch.randn(3, 2, generator=rng, dtype=torch.float64)
        self.tensors = TensorDataset(x, torch.randn(3, generator=rng))

    def client_dataset(self, client):
        return self.all.view(torch.arange(client, len(self.all), 2), None)

    def val_dataset(self):
        return self.all

    def test_dataset(self):
        return Subset(self.tensors, [0, 1])

    @property
    def own(self):
        return in_memory(self.tensors)


def main(folder: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=2)
    fabric.launch()
    rank = fabric.global_rank
    data, before, out = Data(), Data(), {}
    out["bytes"] = share_among_processes(fabric, data)
    both = [
        *zip(
            data.client_dataset(1).batch(torch.arange(3)), before.client_dataset(1).batch(torch.arange(3)), strict=True
        )
    ]
    both += [(data.own.inputs, before.own.inputs), (data.own.targets, before.own.targets)]
    out["same"] = all(torch.equal(a, b) for a, b in both)
    fabric.barrier()
    if rank == 0:  # nothing but this test writes to data: it shows that there is one copy
        data.all.inputs[0, 0] = 255 - before.all.inputs[0, 0]
        data.own.targets[2] = 42.0
    fabric.barrier()
    out["seen"] = (int(data.all.inputs[0, 0]) == 255 - int(before.all.inputs[0, 0]), float(data.own.targets[2]))
    other = Data(odd=7 + rank)
    out["unlike"] = share_among_processes(fabric, other)
    out["untouched"] = len(other.all)
    torch.save(out, folder / f"shared{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

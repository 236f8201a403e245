"""A federation in one process: sites answer when their messages are read, in any order, or not at all."""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlight.flower.client import answer
from fedlight.flower.messages import Parcel


def through_json(parcel: Parcel) -> Parcel:
    """What comes out at the other end; tensors of its own, too."""
    tensors = {name: value.clone() for name, value in parcel.tensors.items()}
    return Parcel(parcel.kind, json.loads(json.dumps(parcel.info)), tensors)


@dataclass
class FakeTransport:
    """Nodes by number, each with its node-config; ``lose`` and ``change`` stand in the way of answers."""

    config: Path
    configs: dict[int, dict[str, Any]]
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    lose: Any = lambda node, parcel: None
    change: Any = lambda node, parcel: parcel
    asked: list[tuple[int, Parcel]] = field(default_factory=list)

    def nodes(self) -> list[int]:
        return list(self.configs)

    def exchange(self, parcels: Mapping[int, Parcel], timeout: float) -> Iterator[tuple[int, Parcel | str]]:
        order = list(parcels)
        self.rng.shuffle(order)
        for node in order:
            self.asked.append((node, parcels[node]))
            found = answer(through_json(parcels[node]), self.config, self.configs[node])
            lost = self.lose(node, parcels[node])
            yield node, self.change(node, through_json(found)) if lost is None else lost


def nodes(folder: Path, clients: list[str], **more: Any) -> dict[int, dict[str, Any]]:
    """One node for each entry of ``clients``, the clients that live there."""
    return {100 + i: {"partition-ids": ids, "state": str(folder / f"site{i}"), **more} for i, ids in enumerate(clients)}

"""What crosses between the server and a site: named tensors, and figures beside them. No framework is needed for it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Parcel:
    """A message in either direction.

    Attributes:
        kind: what is asked for: ``query``, ``train``, ``evaluate``, ``product``; ``refused`` if it is not given.
        info: figures and names, all of which JSON can write.
        tensors: by name; a name begins with the part that it belongs to, as ``received/params``.
    """

    kind: str
    info: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, by the rest of their names."""
        return {k.removeprefix(f"{name}/"): v for k, v in self.tensors.items() if k.startswith(f"{name}/")}

    @property
    def num_bytes(self) -> int:
        """Size of tensors and figures."""
        return sum(v.nbytes for v in self.tensors.values()) + len(json.dumps(self.info))


def part(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a part of a parcel."""
    return {f"{name}/{k}": v.detach() for k, v in tensors.items()}


class Transport(Protocol):
    """The way to the sites."""

    def nodes(self) -> list[int]:
        """Those that are there now."""

    def exchange(self, parcels: Mapping[int, Parcel], timeout: float) -> Iterator[tuple[int, Parcel | str]]:
        """Send one parcel to each node, and hand out each answer as it comes, or why there is none.

        After ``timeout`` seconds those that have not answered are left out.
        """

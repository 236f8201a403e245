"""Clients that live at sites, as the server sees them: by what they send."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from fedlight.flower.messages import Parcel, part
from fedlight.local import ClientResult
from fedlight.perturbations.base import State
from fedlight.server.client_side import ClientSide, Receive
from fedlight.server.senders import Packed, Reply
from fedlight.transforms.attack import chain_of
from fedlight.transforms.base import unpack

_PART = "site"


@dataclass(frozen=True)
class SiteResult(ClientResult):
    """A client's result, of which the server has no more than what was sent."""

    reply: Reply = field(kw_only=True)


class RemoteClients(ClientSide):
    """Clients that live at sites: they make their messages themselves."""

    shows_parts = False

    def trainings(self, clients: Sequence[int], lrs: Any, receive: Receive) -> Iterator[Any]:
        """One training: what its sites do for it is theirs."""
        yield receive, iter(clients)

    def reply(self, result: ClientResult) -> Reply:
        """What was sent."""
        assert isinstance(result, SiteResult)
        return result.reply

    def holds(self, result: ClientResult) -> bool:
        """Nobody waits."""
        return False

    def meet(self, fabric: Fabric) -> list[ClientResult]:
        """Nobody has waited."""
        return []

    def check(self) -> None:
        """Refuse what the chain of transforms cannot take, and know what clients will send."""
        super().check()
        self.expected = self.example_message()

    def round_of(self, client: int) -> int:
        """The last round in which a client's message was used, -1 for none; its state after that counts."""
        row = self.store.get(client, _PART)
        return -1 if row is None else int(row["round"])

    def model(self, view: str) -> dict[str, Tensor]:
        """What a site receives that looks at a model, and trains nothing."""
        params, model = self._server.algorithm["params"], self._server.views[view]
        other = {} if torch.equal(params, model) else {"model": model}
        return part("received", {"params": params}) | part("server", other) | part("buffers", self._server.buffers)

    def tensors(self) -> dict[str, Tensor]:
        """What every site receives that trains."""
        server = {"params": self._server.algorithm["params"]}
        if torch.equal(server["params"], self._received["params"]):
            server = {}
        buffers = {k: v for k, v in self._server.buffers.items() if self.sends_buffers and not self.is_local(k)}
        return part("received", self._received) | part("server", server) | part("buffers", buffers)

    def result(self, client: int, figures: Mapping[str, Any], parcel: Parcel, device: torch.device) -> SiteResult:
        """What a site has sent of a client.

        Raises:
            ValueError: if it is not what this server expects.
        """
        n = int(self._sizes[client])
        tensors = {k: {n: v.to(device) for n, v in parcel.part(f"{client}/{k}").items()} for k in _PARTS}
        packed = Packed(tensors["message"], dict(figures["lengths"]))
        message = unpack(chain_of(self.transforms, client), self._received, packed)
        for found, expected in zip((message, tensors["beside"]), self.expected, strict=True):
            _check_alike(found, expected)
        known = self._server.buffers
        _check_alike({k: v for k, v in tensors["buffers"].items() if k in known}, known, some=True)
        numbers = figures["num_steps"], figures["steps_apart"], figures["lr_sum"]
        if figures["num_samples"] != n or not all(math.isfinite(x) and x >= 0 for x in numbers):
            raise ValueError(f"it counts {figures['num_samples']} samples, and steps {numbers}; {n} samples are known")
        reply = Reply(
            message=message,
            beside=tensors["beside"],
            rows={_PART: {"round": torch.tensor(self._server.round)}},
            steps_apart=int(figures["steps_apart"]),
            part=self.initial,
            packed=packed,
        )
        return SiteResult(
            client=client,
            start=self._received["params"],
            params=message["params"],
            num_samples=n,
            weight=n / self.mean_size,
            num_steps=int(figures["num_steps"]),
            lr_sum=float(figures["lr_sum"]),
            buffers=tensors["buffers"],
            metrics={name: (float(v), float(w)) for name, (v, w) in figures["metrics"].items()},  # type: ignore[misc]
            reductions=dict(figures["reductions"]),
            loss_scale=figures["loss_scale"],
            reply=reply,
        )


_PARTS = ("message", "beside", "buffers")


def _check_alike(found: State, expected: State, some: bool = False) -> None:
    if found.keys() != expected.keys() and not some:
        raise ValueError(f"it has {sorted(found)}, and not {sorted(expected)}")
    for name, value in found.items():
        if (value.shape, value.dtype) != (expected[name].shape, expected[name].dtype):
            here = f"{expected[name].dtype} {list(expected[name].shape)}"
            raise ValueError(f"its {name} is {value.dtype} {list(value.shape)}, and not {here}")

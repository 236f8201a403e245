"""Parcels as Flower's messages: the only file that knows them."""

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fedlight.flower.messages import Parcel

_NUMPY = {torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8}
_NUMPY |= {torch.uint8, torch.bool, torch.complex64, torch.complex128}
_POLL_S = 0.1


def _records(parcel: Parcel) -> RecordDict:
    """A parcel as records: arrays in numpy's own format, without pickles. What numpy has no type for is bytes there."""
    arrays, other = {}, {}
    for name, tensor in parcel.tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.dtype not in _NUMPY:
            other[name] = [str(value.dtype).removeprefix("torch."), list(value.shape)]
            value = value.reshape(-1).view(torch.uint8)
        arrays[name] = value
    text = json.dumps({"kind": parcel.kind, "info": parcel.info, "other": other})
    return RecordDict({"tensors": ArrayRecord(arrays), "parcel": ConfigRecord({"json": text})})


def from_message(message: Any) -> Parcel:
    """The parcel that a message brought."""
    found = json.loads(str(message.content["parcel"]["json"]))
    tensors: dict[str, Tensor] = dict(message.content["tensors"].to_torch_state_dict())
    for name, (dtype, shape) in found["other"].items():
        tensors[name] = tensors[name].view(getattr(torch, dtype)).reshape(shape)
    return Parcel(found["kind"], found["info"], tensors)


def to_reply(parcel: Parcel, message: Any) -> Message:
    """The answer to a message."""
    return Message(content=_records(parcel), reply_to=message)


class FlowerTransport:
    """The nodes of a run on a SuperLink, by Flower's grid."""

    def __init__(self, grid: Any) -> None:
        self._grid = grid

    def nodes(self) -> list[int]:
        """Those that are there now."""
        return list(self._grid.get_node_ids())

    def exchange(self, parcels: Mapping[int, Parcel], timeout: float) -> Iterator[tuple[int, Parcel | str]]:
        """Send one parcel to each node, and hand out each answer as it comes, or why there is none."""
        end, messages = time.monotonic() + timeout, []
        for node, parcel in parcels.items():
            kind = parcel.kind if parcel.kind in ("train", "evaluate") else "query"
            messages.append(Message(_records(parcel), dst_node_id=node, message_type=kind, ttl=timeout + 60))
        waiting = dict(zip(self._grid.push_messages(messages), parcels, strict=True))
        while waiting and time.monotonic() < end:
            for reply in self._grid.pull_messages(list(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id)
                yield node, f"{reply.error.code}: {reply.error.reason}" if reply.has_error() else from_message(reply)
            time.sleep(_POLL_S if waiting else 0)
        for node in waiting.values():
            yield node, f"no answer within {timeout:g} s"

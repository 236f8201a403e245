"""Whether a CPU trains the clients of an experiment side by side: where that is faster, and gives the same bits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedlight.engines.base import LocalTraining
from fedlight.engines.batch_order import StepSizes
from fedlight.engines.recordable import Unrecordable, check_recordable

LARGEST = 50_000
"""Parameters up to which a local step is mostly Python's time, which a batched program has once for all clients."""

_TOGETHER, _ALONE, _ENTRY = 2.4, 1.3, 0.25 / LARGEST
"""A batched step, a step of one client in a program of its own, and an entry of a row more, in eager steps."""

_WORTH = 0.5
"""The share of eager's time that is to be had at most."""

_EXACT = """
    __rshift__ abs add add_ addcdiv addcdiv_ addcmul addcmul_ alias amax amin arange argmax as_strided baddbmm
    bitwise_and bitwise_not bitwise_xor bmm cat clamp clamp_ clamp_max clamp_min clone copy_ cumsum detach detach_ div
    div_ empty empty_like empty_strided eq expand fill_ full full_like gather ge gt hardtanh hardtanh_backward
    huber_loss huber_loss_backward index le leaky_relu leaky_relu_backward lerp lerp_ lift_fresh linalg_vector_norm
    _local_scalar_dense _log_softmax _log_softmax_backward_data logical_and logical_not lt masked_fill masked_fill_ max
    maximum mean minimum mse_loss mse_loss_backward mul mul_ ne neg new_empty new_full new_zeros ones ones_like permute
    _prelu_kernel _prelu_kernel_backward promote_types randperm reciprocal _record_function_enter_new
    _record_function_exit relu relu_ scalar_tensor scatter select select_backward sgn sign slice slice_backward
    smooth_l1_loss smooth_l1_loss_backward split split_with_sizes sqrt squeeze stack sub sub_ sum t threshold_backward
    _to_copy transpose unbind _unsafe_view unsqueeze view where zero_ zeros zeros_like
"""
"""Operations whose result for a row has the same bits, wherever the row stands and however many there are."""

_ALIGNED = """
    elu elu_backward exp gelu gelu_backward hardsigmoid hardsigmoid_backward hardswish hardswish_backward log log1p pow
    rsqrt sigmoid sigmoid_backward silu silu_backward softplus softplus_backward tanh tanh_backward
"""
"""These have other bits at the end of a vector of a processor, so each sample has to fill vectors."""

_VECTOR = 64
"""Entries of the longest unrolled vector."""

_PLACES = 17
"""In so many places a client is compared with itself: then addresses are as far from a multiple of 64 bytes again."""


def why_not_faster(training: LocalTraining) -> str | None:
    """Why a batched program cannot be, or would not be much faster than one client after the other; None if it would.

    It depends on model, clients and settings only, not on processes, rounds or a clock: so every process finds the
    same, and a run that is continued as well.
    """
    if training.compile:
        return "trainer.compile is true"
    entries = sum(p.numel() for p in training.module.parameters() if p.requires_grad)
    if entries > LARGEST:
        return f"the model has more than {LARGEST:,} parameters"
    if training.fabric.strategy.precision.precision != "32-true":
        return "trainer.precision is not 32-true"
    try:
        check_recordable(training, "vmap")
    except Unrecordable as error:
        return error.reason
    sizes, together = StepSizes(training), training.per_round
    cost = sizes.batched * (_TOGETHER + together * entries * _ENTRY) + sizes.single * _ALONE
    if cost > _WORTH * sizes.steps * together:
        return f"steps of {together} clients are too few, or too unlike, to be one program"
    return None


def why_not_same(step: Callable[[int, int], Tensor], training: LocalTraining) -> str | None:
    """Why a client's bits would depend on who trains beside it; None if they do not.

    ``step`` trains the example so many times side by side, with so many samples: the parameters ``[clients, P]``.
    """
    for sizes in sorted(StepSizes(training).shared, reverse=True):
        with _Watch(2 * max(sizes)) as watch:
            two = step(2, sum(sizes))
        if watch.found:
            return f"{watch.found[0]} may round differently beside other clients"
        many = step(min(max(3, training.per_round), _PLACES), sum(sizes))
        if not bool((many == two[0]).all() and (two[1] == two[0]).all()):
            return "it draws, or this processor rounds, differently beside other clients"
    return None


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects operations that are not known to treat every row alike, of a step with so many samples of all."""

    def __init__(self, samples: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._samples, self.found = samples, list[str]()
        self._exact, self._aligned = frozenset(_EXACT.split()), frozenset(_ALIGNED.split())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        power = name == "pow" and not isinstance(args[1], Tensor) and args[1] in (0.5, 1, 2, 3)
        exact = name in self._exact or power
        aligned = name in self._aligned and isinstance(out, Tensor) and out.numel() % (self._samples * _VECTOR) == 0
        norm = name == "linalg_vector_norm" and len(args) > 1 and args[1] != 2
        if norm or not (exact or (aligned and torch.get_num_threads() == 1)):
            self.found.append(name)
        return out

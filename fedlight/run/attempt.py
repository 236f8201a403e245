"""A step that is tried before training, and what an evaluation leaves in a module: no mode, no random numbers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers.abstract import WrapperMetric

from fedlight.engines.moving import Moving
from fedlight.module.hooks import overrides
from fedlight.module.logs import LogCollector, collecting_logs, with_attributes
from fedlight.module.looking import watched
from fedlight.module.state import ModuleState, untouched
from fedlight.penalties.step import call_step
from fedlight.seeding import preserved_global_rng


def trial_step(
    module: LightningModule,
    batch: Any,
    context: AbstractContextManager[Any] | None = None,
    look: Callable[[Any], None] | None = None,
) -> Any:
    """What ``training_step`` returns and ``look`` looks at; all of the module and all random numbers are as before."""

    def step() -> Any:
        log, within = LogCollector(module.device), context or nullcontext()
        # Gradients are on: a step may take some by itself (`autograd.grad`, as in a gradient penalty).
        held = Moving(module)
        with untouched(module), watched(module, set()), collecting_logs(module, log), torch.enable_grad(), within:
            output = call_step(module, "training_step", batch, 0)
            held.read()  # refuses buffers that have changed their shape
            if look is not None:
                look(output)
            return output

    return prepared(module, step)


def prepared(module: LightningModule, attempt: Callable[[], Any]) -> Any:
    """The result of an attempt; where it fails, that of one with what the module's hooks of a start prepare."""
    try:
        return attempt()
    except Exception as error:
        hooks = [name for name in ("on_fit_start", "on_train_start") if overrides(module, name)]
        if not hooks:
            raise
        with untouched(module):
            try:
                for name in hooks:
                    getattr(module, name)()
            except Exception:  # a hook that cannot be tried says nothing of the batch
                raise error from None
            return attempt()


class LossesSaid(TorchFunctionMode):
    """Says where a loss of torch's is given what it does not take: probabilities for logits, or no logarithms."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at what a loss is given, and call it."""
        given: Any = args[0] if args else (kwargs or {}).get("input")
        looks = func in _LOSSES and isinstance(given, Tensor) and torch._C._functorch.maybe_current_level() is None
        if looks and (what := _misfit(func, given)):
            rank_zero_warn(f"model: training_step gives {func.__name__} {what}.")
        return func(*args, **kwargs or {})


def _misfit(loss: Any, given: Tensor) -> str:
    rows = given.detach() if given.ndim > 1 and len(given) else given.new_zeros(1, 1)
    if loss is F.nll_loss:
        logs = bool((rows.logsumexp(1).abs() < 0.1).any())
        return "" if logs else "no logarithms of probabilities: no row's exponentials sum to 1. Use cross_entropy"
    if _squashed(given):
        return "what a sigmoid puts out. It takes logits, and has its own: remove the model's"
    if loss is F.cross_entropy and bool(((rows.sum(1) - 1).abs() < 1e-3).all() and (rows >= 0).all()):
        own = "It takes logits, and has a softmax of its own; with two, little is learned. Remove the model's"
        return f"probabilities, as of a softmax: each row sums to 1. {own}"
    return ""


_LOSSES = F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits
_SHAPING = ("View", "ReshapeAlias", "Squeeze", "Unsqueeze", "Slice", "Select", "ToCopy")


def _squashed(input: Tensor) -> bool:
    """Whether it is what a sigmoid puts out, perhaps in another shape."""
    node = input.grad_fn
    while node is not None and node.name().split("Backward")[0] in _SHAPING:
        node = node.next_functions[0][0]
    return node is not None and node.name() == "SigmoidBackward0"


def check_gradient(module: LightningModule, output: Any) -> None:
    """Refuse a loss that leads to no parameter, and warn of one that no parameter changes."""
    loss, name = output.get("loss") if isinstance(output, Mapping) else output, type(module).__name__
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return
    if not loss.requires_grad:
        raise MisconfigurationException(
            f"model: the loss of {name}.training_step leads to no parameter that is trained. Return it as it was"
            " computed: not detached, of no argmax, outside of torch.no_grad, and train what it is made with."
        )
    before = [(p, p.grad) for p in module.parameters()]
    module.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    grads = [p.grad._values() if p.grad.is_sparse else p.grad for p, _ in before if p.grad is not None]
    if not any(bool(grad.any()) for grad in grads):
        rank_zero_warn(
            f"model: the gradient of {name}.training_step is 0 in every entry of the first batch. Nothing is trained"
            " where it stays so, as by cross_entropy of one logit (for binary_cross_entropy_with_logits) or softmax."
        )
    for p, grad in before:
        p.grad = grad


@contextmanager
def evaluating(module: LightningModule, whole: bool = True) -> Iterator[None]:
    """Evaluation mode inside; each submodule's own mode, and the global random generators as before, outside.

    Layers whose ``train`` does more (LoRA that merges itself for an evaluation) undo that, and have the same weights.
    Where it is not ``whole``, as nobody calls the hooks of its end, what is trained is as before.
    """
    modes, trainer = {m: m.training for m in module.modules()}, getattr(module, "_trainer", None)
    switching = [m for m in modes if type(m).train is not nn.Module.train]
    own = {p for m in switching for p in m.parameters(recurse=False)}
    own |= set() if whole else {p for p in module.parameters() if p.requires_grad}
    kept = [(p, p.data, p.detach().clone()) for p in own]
    module.eval()
    try:
        # Processes share the batches: none of them could wait for what the others do in a step.
        with preserved_global_rng(), with_attributes([] if trainer is None else [trainer], {"alone": True}):
            yield
    finally:
        for m in switching:
            m.train(modes[m])
        for parameter, data, value in kept:
            parameter.data = data
            data.copy_(value)
        for m, mode in modes.items():
            m.training = mode


def watch(module: nn.Module) -> ModuleState:
    """A module as it is now, but for parameters and torchmetrics: to see what a batch or an evaluation changes."""
    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    return ModuleState({"self": module}, lambda: [*module.parameters(), *metrics])  # type: ignore[list-item]


def say_traces(module: LightningModule, stage: str, kept: ModuleState, anew: Sequence[str]) -> None:
    """Say what an evaluation in a fit has changed of the module that was ``kept``, and no checkpoint has.

    What the first hooks of every evaluation change is found ``anew``.
    """
    seen = {f"self.{name}": m for name, m in module.named_modules() if isinstance(m, Metric) and m.update_called}
    metrics = {name for name, m in seen.items() if not isinstance(m, WrapperMetric)}  # what is inside has the numbers
    groups = tuple(f"self.{name}._" for name, m in module.named_modules() if isinstance(m, MetricCollection))
    changed = {name for name in kept.changes() if not name.startswith(groups)}  # found anew where they begin anew
    plain = changed - {*anew, *(f"self.{name}" for name, _ in module.named_buffers())}
    if (names := metrics | plain) and module.trainer.state.fn == "fit" and not overrides(module, "on_save_checkpoint"):
        rank_zero_info(
            f"model: {stage} changes {', '.join(sorted(names))}, and no checkpoint has it: unless it begins anew in"
            f" on_{stage}_start, what is logged of it is another after a resume. Or keep it in on_save_checkpoint."
        )
    if plain and module.trainer.state.fn == "fit":
        rank_zero_info(
            f"model: {', '.join(sorted(plain))}: views and clients are evaluated with what the server's evaluation left"
            " there, where they do not begin anew; a torchmetrics.Metric begins anew for each of them."
        )

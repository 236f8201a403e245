"""Which hooks of module and callbacks a federated run calls, and which it refuses."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from numbers import Real
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.profilers import AdvancedProfiler, PassThroughProfiler, Profiler
from torch import Tensor

from fedlight.module.logs import LogCollector, collecting_logs
from fedlight.module.looking import Looking, once_known
from fedlight.penalties.base import Penalty
from fedlight.run.folder import optional

EPOCH_HOOKS = ("on_train_epoch_start", "on_train_epoch_end")
BATCH_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
_REFUSED_MODULE = {
    "optimizer_zero_grad": "gradients are views of one vector that the engine clears",
    "backward": "the engine runs the backward pass, once or twice per step",
    "configure_gradient_clipping": "use trainer.gradient_clip_val",
    "configure_sharded_model": "models are not sharded",
    **dict.fromkeys(("on_validation_model_eval", "on_validation_model_train"), "the trainer sets the mode"),
    **dict.fromkeys(("on_test_model_eval", "on_test_model_train"), "the trainer sets the mode"),
    **dict.fromkeys(
        ("training_epoch_end", "validation_epoch_end", "test_epoch_end"),
        "as in Lightning 2; keep outputs in a list, and use on_train_epoch_end, on_validation_epoch_end and their like",
    ),
}
_REFUSED_CALLBACKS = {
    "StochasticWeightAveraging": "it replaces optimizer and loop of a plain Trainer",
    "WeightAveraging": "the server averages; use algorithm",
    "OnExceptionCheckpoint": "last.ckpt is written as the run goes on",
    "GradientAccumulationScheduler": "use trainer.accumulate_grad_batches",
    "BatchSizeFinder": "set data.batch_size",
    "LearningRateFinder": "set the learning rate in configure_optimizers",
    "BaseFinetuning": "parameters cannot be unfrozen while they are one flat vector",
    "ModelPruning": "parameters cannot be replaced while they are one flat vector",
    "SpikeDetection": "clients whose update is not finite are left out",
}
_EPOCH: dict[str, tuple[str, tuple[Any, ...]]] = {
    **{"on_train_epoch_start": ("on_round_start", ()), "on_train_batch_start": ("on_round_start", (None, 0))},
    **{"on_train_batch_end": ("on_round_trained", (None, None, 0)), "on_train_epoch_end": ("on_round_trained", ())},
}
_BY_ROUND = {
    **dict.fromkeys(("LearningRateMonitor", "DeviceStatsMonitor", "Timer"), _EPOCH),
    "EarlyStopping": {
        "on_train_epoch_end": ("on_round_trained on_round_end", ()),
        "on_validation_end": ("on_validation_end on_round_end", ()),
    },
}
"""Lightning's callbacks to which a round is a batch and an epoch: when which hooks are called instead, with what.

One that monitors something is asked once a round, as soon as that is known."""
_LOOKING = ("LearningRateMonitor", "DeviceStatsMonitor", "ThroughputMonitor")
"""Lightning's callbacks that log to the loggers themselves, a step at a time: here that joins the row of the round."""


_BASES = {
    *("LightningModule", "ModelHooks", "DataHooks", "CheckpointHooks", "HyperparametersMixin"),
    *("Callback", "Module", "object", "_DeviceDtypeModuleMixin"),
}
_PACKAGES = {"lightning", "pytorch_lightning", "torch", "builtins"}


def overrides(instance: object, name: str) -> bool:
    """Whether ``instance`` defines the method ``name`` anew, on itself or in a class below Lightning's base classes."""
    if name in vars(instance):
        return True
    for cls in type(instance).__mro__:
        if name in vars(cls) and not (cls is Penalty and name in EPOCH_HOOKS + BATCH_HOOKS):  # for Lightning's Trainer
            return not (cls.__name__ in _BASES and cls.__module__.split(".")[0] in _PACKAGES)
    return False


def strangers(callbacks: Iterable[Callback]) -> list[Callback]:
    """The callbacks whose hooks are neither ours nor Lightning's."""
    known = ("fedlight.", "lightning.")
    return [c for c in callbacks if isinstance(c, LambdaCallback) or not c.__module__.startswith(known)]


def check_module(module: LightningModule) -> None:
    """Refuse by name what federated training cannot honour.

    Raises:
        MisconfigurationException: naming the hook or setting and what to do instead.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"model: {name} sets automatic_optimization=False; manual optimization cannot be federated. Return the loss"
            " from training_step and remove it."
        )
    for required in ("training_step", "configure_optimizers"):
        if not overrides(module, required):
            raise MisconfigurationException(f"model: {name} does not define {required}.")
    for hook, instead in _REFUSED_MODULE.items():
        if overrides(module, hook):
            raise MisconfigurationException(f"model: {name} overrides {hook}, which is not supported: {instead}.")


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Refuse by name Lightning's callbacks that drive a plain Trainer's loop.

    Raises:
        MisconfigurationException: naming the callback and what to do instead.
    """
    for callback in callbacks:
        if (name := lightnings(callback, _REFUSED_CALLBACKS)) is not None:
            raise MisconfigurationException(
                f"trainer.callbacks: {name} does not work in federated training: {_REFUSED_CALLBACKS[name]}."
            )


def lightnings(callback: Callback, names: Iterable[str]) -> str | None:
    """Which of these classes of Lightning a callback is of."""
    theirs = [cls.__name__ for cls in type(callback).__mro__ if cls.__module__.split(".")[0] in _PACKAGES]
    return next((name for name in theirs if name in names), None)


def _moved(callback: Callback) -> dict[str, tuple[str, tuple[Any, ...]]]:
    return _BY_ROUND.get(lightnings(callback, _BY_ROUND) or "", {})


class Hooks:
    """Calls a hook on every callback and on the module that override it; the look-up is done once.

    A callback may name ``optional_hooks``, in which it draws or prints: what fails there does not end the run. The
    profiler is told of every call, under Lightning's names.

    Attributes:
        audience: each callback, and the trainer as it sees it.
        quiet: whether the module's own hooks alone are called.
        logged: what was logged in hooks that are called once.
    """

    quiet = False

    def __init__(
        self, trainer: Any, module: LightningModule, callbacks: list[Callback], profiler: Profiler | None = None
    ) -> None:
        # cProfile, which AdvancedProfiler uses, cannot run inside itself, and most hooks run inside a part of a round.
        passes = profiler is None or isinstance(profiler, PassThroughProfiler | AdvancedProfiler)
        self._profiler = None if passes else profiler
        self._module, self._callbacks = module, callbacks
        self.audience: list[tuple[Callback, Any]] = [
            (c, trainer if lightnings(c, _LOOKING) is None else Looking(trainer, c)) for c in callbacks
        ]
        self._table: dict[str, list[Callable[..., Any]]] = {}
        self._asked: dict[tuple[int, str], set[str]] = {}
        self._once, self.logged = set[str](), dict[str, Tensor]()

    def overridden(self, name: str) -> list[str]:
        """Class names of the callbacks, and of the module, that override a hook."""
        owners = [type(c).__name__ for c in self._callbacks if overrides(c, name) and name not in _moved(c)]
        return owners + ([type(self._module).__name__] if overrides(self._module, name) else [])

    def __call__(self, name: str, *args: Any) -> bool:
        """Call the hook; true if any returned -1, which in Lightning skips the rest of the epoch."""
        if self.quiet:
            self.module_only(name, *args)
            return False
        if self._table.get(name) == []:  # several are called in every local step, and hardly anyone overrides them
            return False
        return any(r == -1 for r in self._call(name, *args) if isinstance(r, int))

    def once(self, name: str) -> None:
        """Call a hook that was not called in this way before, and keep what it logs."""
        if name not in self._once:
            self._once.add(name)
            with collecting_logs(self._module, LogCollector(self._module.device)) as log:
                self(name)
            self.logged |= log.compute()

    def collect(self, name: str, *args: Any) -> dict[str, Any]:
        """Call the hook, and join the dictionaries of numbers that it gives, but `round`; anything else is refused."""
        joined: dict[str, Any] = {}
        for found in (found for found in self._call(name, *args) if found is not None):
            values = found.values() if isinstance(found, Mapping) and all(isinstance(k, str) for k in found) else [None]
            numbers = all(isinstance(v, Real) or (isinstance(v, Tensor) and v.numel() == 1) for v in values)
            if not numbers or "round" in found:
                may = "it may give a dictionary of numbers by their names, but `round`, which numbers the row"
                raise MisconfigurationException(f"trainer.callbacks: {name} gives {found!r:.80}; {may}.")
            joined |= found
        return joined

    def module_only(self, name: str, *args: Any) -> None:
        """Call the module's own hook."""
        if overrides(self._module, name):
            getattr(self._module, name)(*args)

    def _call(self, name: str, *args: Any) -> list[Any]:
        if name not in self._table:
            self._table[name] = self._bind(name)
        return [fn(*args) for fn in self._table[name]]

    def _bind(self, name: str) -> list[Callable[..., Any]]:
        bound: list[Callable[..., Any]] = []
        for callback, trainer in self.audience:
            moved = _moved(callback)
            hooks = {own: args for own, (event, args) in moved.items() if name in event.split()}
            if name not in moved:
                hooks[name] = ()
            for hook, args in hooks.items():
                if overrides(callback, hook):
                    call: Callable[..., Any] = partial(getattr(callback, hook), trainer, self._module, *args)
                    if name in getattr(callback, "optional_hooks", ()):
                        call = optional(callback, f"trainer.callbacks: {type(callback).__name__}")(call)
                    if hook in moved and hasattr(callback, "monitor"):
                        call = once_known(call, callback, trainer, hook, self._asked)
                    bound.append(self._profiled(call, f"[Callback]{callback.state_key}.{hook}"))
            if name == "on_round_metrics" and isinstance(trainer, Looking):
                bound.append(trainer.take)
        if overrides(self._module, name):
            own = getattr(self._module, name)
            bound.append(self._profiled(own, f"[LightningModule]{type(self._module).__name__}.{name}"))
        return bound

    def _profiled(self, call: Callable[..., Any], action: str) -> Callable[..., Any]:
        return call if self._profiler is None else self._profiler.profile(action)(call)

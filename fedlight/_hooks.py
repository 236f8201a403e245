"""Which hooks of module and callbacks a federated run calls, and which it refuses."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.profilers import AdvancedProfiler, PassThroughProfiler, Profiler

from fedlight.callbacks.checkpoint import Checkpoint
from fedlight.run_folder import optional

FIT_HOOKS = ("on_fit_start", "on_train_start", "on_train_end", "on_fit_end")
EPOCH_HOOKS = ("on_train_epoch_start", "on_train_epoch_end")
BATCH_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
ROUND_HOOKS = ("on_round_start", "on_client_start", "on_client_end", "on_round_metrics", "on_round_end")
EVALUATION_HOOKS = tuple(
    f"on_{stage}_{when}"
    for stage in ("validation", "test")
    for when in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end")
)
CHECKPOINT_HOOKS = ("on_save_checkpoint", "on_load_checkpoint")
SUPPORTED = {
    *(*FIT_HOOKS, *EPOCH_HOOKS, *BATCH_HOOKS, *ROUND_HOOKS, *EVALUATION_HOOKS, *CHECKPOINT_HOOKS),
    *("setup", "teardown", "configure_model", "configure_callbacks", "on_exception"),
}
"""Hooks that are called with the arguments that Lightning gives them (and the round hooks, which are ours)."""

_REFUSED_MODULE = {
    "optimizer_step": "the local step belongs to the engine; change the optimizer in configure_optimizers",
    "optimizer_zero_grad": "gradients are views of one vector that the engine clears",
    "backward": "the engine runs the backward pass, once or twice per step",
    "configure_gradient_clipping": "use trainer.gradient_clip_val",
    "lr_scheduler_step": "return a scheduler that steps by itself",
    "configure_sharded_model": "models are not sharded",
    "on_validation_model_eval": "the trainer sets the mode",
    "on_validation_model_train": "the trainer sets the mode",
    "on_test_model_eval": "the trainer sets the mode",
    "on_test_model_train": "the trainer sets the mode",
}
_REFUSED_CALLBACKS = {
    "ModelCheckpoint": "checkpoints are written by fedlight.callbacks.Checkpoint",
    "StochasticWeightAveraging": "it replaces optimizer and loop of a plain Trainer",
    "WeightAveraging": "the server averages; use algorithm",
    "OnExceptionCheckpoint": "last.ckpt is written as the run goes on",
    "GradientAccumulationScheduler": "use trainer.accumulate_grad_batches",
    "BatchSizeFinder": "set data.batch_size",
    "LearningRateFinder": "set the learning rate in configure_optimizers",
    "LearningRateMonitor": "the learning rate of each round is logged as `lr`",
    "BaseFinetuning": "parameters cannot be unfrozen while they are one flat vector",
    "ModelPruning": "parameters cannot be replaced while they are one flat vector",
    "DeviceStatsMonitor": "seconds and megabytes of each round are logged as `time/` and `comm/`",
    "ThroughputMonitor": "seconds of each round are logged as `time/`",
    "SpikeDetection": "clients whose update is not finite are left out",
    "Timer": "set trainer.max_rounds, or end the run with SIGTERM, which finishes the round",
    "ProgressBar": "use trainer.enable_progress_bar",
}


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
        if name in vars(cls):
            return not (cls.__name__ in _BASES and cls.__module__.split(".")[0] in _PACKAGES)
    return False


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
        for cls in type(callback).__mro__:
            if cls.__name__ in _REFUSED_CALLBACKS and cls.__module__.split(".")[0] in _PACKAGES:
                raise MisconfigurationException(
                    f"trainer.callbacks: {cls.__name__} does not work in federated training:"
                    f" {_REFUSED_CALLBACKS[cls.__name__]}."
                )


def with_module_callbacks(callbacks: Iterable[Callback], module: LightningModule) -> list[Callback]:
    """The trainer's callbacks and those of the module's ``configure_callbacks``, which replace others of their type.

    Those that write checkpoints come late, as in Lightning, so that they save what the others did in the round. Only
    those that draw or print come after them: no round is lost in a run that is killed meanwhile.
    """
    own: list[Callback] = []
    if overrides(module, "configure_callbacks"):
        found = module.configure_callbacks()
        own = [found] if isinstance(found, Callback) else list(found)
    together = [c for c in callbacks if type(c) not in {type(o) for o in own}] + own
    return sorted(together, key=lambda c: (bool(getattr(c, "optional_hooks", ())), isinstance(c, Checkpoint)))


class Hooks:
    """Calls a hook on every callback and on the module that override it; the look-up is done once.

    A callback may name ``optional_hooks``, in which it draws or prints: what fails there does not end the run.

    Args:
        trainer: handed to the callbacks.
        module: the module.
        callbacks: the callbacks, in order.
        profiler: told of every call, under Lightning's names.
    """

    def __init__(
        self, trainer: Any, module: LightningModule, callbacks: list[Callback], profiler: Profiler | None = None
    ) -> None:
        # cProfile, which AdvancedProfiler uses, cannot run inside itself, and most hooks run inside a part of a round.
        passes = profiler is None or isinstance(profiler, PassThroughProfiler | AdvancedProfiler)
        self._profiler = None if passes else profiler
        self._trainer, self._module, self._callbacks = trainer, module, callbacks
        self._table: dict[str, list[Callable[..., Any]]] = {}

    def overridden(self, name: str) -> list[str]:
        """Class names of the callbacks, and of the module, that override a hook."""
        owners = [type(c).__name__ for c in self._callbacks if overrides(c, name)]
        return owners + ([type(self._module).__name__] if overrides(self._module, name) else [])

    def __call__(self, name: str, *args: Any) -> bool:
        """Call the hook; true if any returned -1, which in Lightning skips the rest of the epoch."""
        if self._table.get(name) == []:  # several are called in every local step, and hardly anyone overrides them
            return False
        return any(r == -1 for r in self._call(name, *args) if isinstance(r, int))

    def collect(self, name: str, *args: Any) -> dict[str, Any]:
        """Call the hook, and join the dictionaries that it returns."""
        return {k: v for found in self._call(name, *args) if found is not None for k, v in found.items()}

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
        for callback in self._callbacks:
            if overrides(callback, name):
                call: Callable[..., Any] = partial(getattr(callback, name), self._trainer, self._module)
                if name in getattr(callback, "optional_hooks", ()):
                    call = optional(callback, f"trainer.callbacks: {type(callback).__name__}")(call)
                bound.append(self._profiled(call, f"[Callback]{callback.state_key}.{name}"))
        if overrides(self._module, name):
            own = getattr(self._module, name)
            bound.append(self._profiled(own, f"[LightningModule]{type(self._module).__name__}.{name}"))
        return bound

    def _profiled(self, call: Callable[..., Any], action: str) -> Callable[..., Any]:
        if self._profiler is None:
            return call
        profile = self._profiler.profile

        def profiled(*args: Any) -> Any:
            with profile(action):
                return call(*args)

        return profiled

"""``config.yaml``: how a run is begun again."""

from pathlib import Path
from typing import Any

import yaml

from fedlight.callbacks._rounds import RoundCallback
from fedlight.callbacks.checkpoint import Checkpoint
from fedlight.callbacks.pictures import Curves, PartitionPicture
from fedlight.callbacks.progress import RoundProgress
from fedlight.run.folder import atomic_write, keep_config, writing
from fedlight.run.loggers import tell
from fedlight.run.names import dotted
from fedlight.written import Lost, written

_DEFAULTS = (Checkpoint, RoundProgress, PartitionPicture, Curves)
_FREE = ("trainer.logger", "trainer.profiler", "trainer.engine")


class ConfigFile(RoundCallback):
    """Writes the complete configuration to the run's folder, and hands it to the loggers.

    Every run has one. That of a Python program is read off its live objects before a fit changes them.
    """

    def text(self, trainer: Any, continued: bool) -> str:
        """The configuration as YAML; of a run that is continued, without how that was done."""
        return str(trainer.config)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Write ``config.yaml`` when a fit begins."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not trainer.resumed:
            self._write(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Write it when a run is continued, now that nothing stands against that; what was there before is kept."""
        if trainer.resumed:
            self._write(trainer)

    def _write(self, trainer: Any) -> None:
        if trainer.log_dir is None or not trainer.is_global_zero:
            return
        path = Path(trainer.log_dir) / "config.yaml"
        if path.exists() and trainer.current_round >= trainer.max_rounds:
            return
        text = self.text(trainer, path.exists())
        with writing(path.parent):
            if path.exists():
                keep_config(path.parent, trainer.current_round, path.read_bytes() == text.encode())
            atomic_write(path, text.encode())
        # By dotted keys: a sweep's parameter `algorithm` would take the place of all below `algorithm`.
        logged = dotted(yaml.safe_load(text))
        tell(trainer.loggers, lambda logger: logger.log_hyperparams(logged))


def config_yaml(trainer: Any, model: Any, datamodule: Any) -> str:
    """What ``fedlight fit -c`` runs again, where classes can be imported and tell what they were made with.

    What plays no part in training is left out where it cannot be written, with a comment. Of anything else the file
    says so under ``not_written``, a key that the command line refuses.
    """
    lost = Lost()
    settings = {key: vars(trainer).get(key, value) for key, value in trainer.settings.items()}
    parts = {key: written(settings.pop(key), key, lost) for key in ("algorithm", "perturbation")}
    callbacks = [callback for callback in trainer.callbacks if not _is_default(callback)]
    settings |= {"callbacks": callbacks or None, "allow_changes": False}
    del settings["seed"]
    config = {
        "seed_everything": trainer.seed,
        **parts,
        "trainer": {key: written(value, f"trainer.{key}", lost) for key, value in settings.items()},
        "model": written(model, "model", lost),
        "data": written(datamodule, "data", lost),
    }
    lines = [
        "# Of a Python program. Its initial weights were those that its module came with: they are the same here if it",
        f"# called seed_everything({trainer.seed}) just before it made the module.",
    ]
    for key in [key for key in lost if key.startswith(_FREE)]:
        name = key.split(".")[1]
        lines.append(f"# Left out: trainer.{name}: {lost.pop(key)}.")
        config["trainer"].pop(name, None)
    if lost:
        config["not_written"] = [f"{key}: {why}" for key, why in lost.items()]
    return "\n".join([*lines, yaml.safe_dump(config, sort_keys=False)])


def _is_default(callback: Any) -> bool:
    """Whether every run has it anyhow."""
    same = type(callback) in _DEFAULTS and written(callback, "", Lost()) == written(type(callback)(), "", Lost())
    return same or isinstance(callback, ConfigFile)

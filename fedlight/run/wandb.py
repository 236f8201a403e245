"""Weights & Biases: how a run begins there, checkpoints as artifacts, and charts; of any logger that is Lightning's."""

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from fedlight.run.names import aggregate, best_row, preferred_metric

PREFIX = "wandb:"
"""What a ``ckpt_path`` begins with that names an artifact."""


def is_wandb(logger: Any) -> bool:
    """Whether a logger is Lightning's of W&B, or made like it."""
    return hasattr(logger, "_wandb_init")


def begin(logger: Any, folder: Path, id: str | None, name: str) -> None:
    """Begin a W&B run below the run's ``folder``, or continue the one with this ``id``; offline if there is no server.

    Raises:
        MisconfigurationException: for settings that W&B does not take.
    """
    import wandb

    if (wanted := getattr(logger, "_log_model", False)) not in (True, False, "all"):
        raise MisconfigurationException(
            f"trainer.logger.init_args.log_model={wanted!r}: use true (best and last checkpoint when the fit ends), all"
            " (whenever one is written) or false."
        )
    settings = logger._wandb_init
    logger.given = vars(logger).get("given", dict(settings))  # a logger may see several fits, each in a folder
    settings.clear()
    settings.update(logger.given)
    if getattr(logger, "begun_here", False):  # and ended here
        logger._experiment = None
    _fill_in(settings, folder, id, name)
    logger._save_dir, logger._project, logger._name = settings["dir"], settings["project"], settings["name"]
    logger._id, logger.checkpoints, logger.defined = settings["id"], {}, set()
    logger.begun_here = wandb.run is None
    try:
        _ = logger.experiment
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        settings["mode"] = "offline"
        try:
            run = logger.experiment
        except (wandb.errors.CommError, wandb.errors.UsageError):
            raise MisconfigurationException(f"trainer.logger: {error}") from error
        rank_zero_warn(
            f"W&B cannot be reached ({str(error).splitlines()[0]}), so this run is logged offline. To upload it later:"
            f" wandb sync {run.settings.sync_dir}"
        )
    except (TypeError, ValueError) as error:  # what wandb.init does not know
        raise MisconfigurationException(f"trainer.logger.init_args: {error}") from error


def _fill_in(settings: dict[str, Any], folder: Path, id: str | None, name: str) -> None:
    """The settings that the user has left open, there and in the environment."""
    if str(settings.get("dir", ".")) in (".", "None"):
        settings["dir"] = str(folder)
    if settings.get("project") == "lightning_logs":  # Lightning's default
        settings["project"] = None
    # Of a run that is continued, W&B knows name and group, or those that its user has given it there.
    ours = {"project": "fedlight"} | ({} if id else {"name": f"{name}-{folder.name}", "group": folder.parent.name})
    for key, variable in {"project": "PROJECT", "name": "NAME", "group": "RUN_GROUP"}.items():
        settings[key] = settings.get(key) or os.environ.get(f"WANDB_{variable}") or ours.get(key)
    settings["id"] = settings.get("id") or id
    # W&B's own patience is 90 s, which every run of a study would wait where there is no network.
    settings["settings"] = settings.get("settings") or {"init_timeout": float(os.environ.get("WANDB_INIT_TIMEOUT", 30))}


def of_round(logger: Any, row: Mapping[str, float], clients: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """What W&B gets beside a round's row: a histogram of what validation logged on the ``clients``' own data.

    Every metric of the row is drawn over ``round``, and of accuracies and losses the summary keeps the best value.
    """
    if not is_wandb(logger):
        return {}
    import wandb

    prefix = getattr(logger, "_prefix", "")
    axis, *names = (f"{prefix}-{name}" if prefix else name for name in ("round", *row))
    for name in (axis, "*", *names):
        if name not in logger.defined:
            logger.defined.add(name)
            logger.experiment.define_metric(name, step_metric=None if name == axis else axis, summary=aggregate(name))
    judged = str(preferred_metric(dict.fromkeys(name for metrics in clients.values() for name in metrics)))
    values = [v for metrics in clients.values() if math.isfinite(v := metrics.get(judged, math.nan))]
    return {f"clients/{judged.removeprefix('val/')}": wandb.Histogram(values)} if values else {}


def log_best(logger: Any, rows: Iterable[Mapping[str, float]]) -> None:
    """Put the best value of what validation logged, and its round, into the summary below ``best/``."""
    names = dict.fromkeys(name for row in rows for name in row if not name.endswith("_selected"))
    for name in [n for n in names if n.startswith("val")] or [n for n in names if aggregate(n)]:
        if best := best_row(rows, name):
            logger.experiment.summary.update({f"best/{name}": best[name], f"best/{name}_round": int(best["round"])})


def note_checkpoint(logger: Any, path: Path, content: Mapping[str, Any], callback: Any) -> None:
    """A ``callback`` has written a checkpoint: ``log_model: all`` uploads it now, ``true`` when the fit has ended."""
    if not logger._log_model:
        return
    lines = content["fedlight"]["metrics"].splitlines()
    last = next(csv.DictReader([lines[0], lines[-1]])) if lines else {}
    settings = {key: getattr(callback, key, None) for key in ("monitor", "mode", "every_n_rounds")}
    settings["monitor"] = settings["monitor"] or preferred_metric(n for n in last if n.startswith("val"))
    score = last.get(str(settings["monitor"]))
    about = {"score": float(score) if score else None, "original_filename": path.name, "rounds": content["epoch"]}
    logger.checkpoints.pop(path, None)
    logger.checkpoints[path] = {**about, type(callback).__name__: settings}
    if logger._log_model == "all":
        upload(logger)


def upload(logger: Any) -> None:
    """Upload the checkpoints that wait for it, as Lightning's logger does, the latest last."""
    import wandb

    waiting, logger.checkpoints = logger.checkpoints, {}
    for path, metadata in waiting.items():
        name = logger._checkpoint_name or f"model-{logger.experiment.id}"
        artifact = wandb.Artifact(name, type="model", metadata=metadata)
        artifact.add_file(str(path), name="model.ckpt", policy=logger.add_file_policy)
        logger.experiment.log_artifact(artifact, aliases=["latest", path.stem, f"round-{metadata['rounds']}"])


def download(wanted: str) -> Path:
    """The checkpoint of ``wandb:entity/project/artifact:alias``, downloaded to ``artifacts/`` as W&B does.

    Raises:
        MisconfigurationException: if W&B is offline, lets nobody in, or has no such artifact with one checkpoint.
    """
    import wandb

    name = wanted.removeprefix(PREFIX)
    if (mode := os.environ.get("WANDB_MODE", "online")) not in ("online", "shared"):
        raise MisconfigurationException(
            f"ckpt_path={wanted!r}: with WANDB_MODE={mode} nothing is downloaded; online, artifact {name!r} would be"
            " fetched to artifacts/. Unset WANDB_MODE, or give the path of a file."
        )
    try:
        (file,) = Path(wandb.Api().artifact(name).download()).rglob("*.ckpt")
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise MisconfigurationException(
            f"ckpt_path={wanted!r}: W&B gives no artifact {name!r} with one checkpoint ({type(error).__name__}:"
            f" {error}). It is named wandb:ENTITY/PROJECT/model-RUNID:best, as on its page; `wandb login` lets you in."
        ) from error
    return file


def log_curve(logger: Any, key: str, columns: list[str | int], data: list[list[float]]) -> None:
    """A custom chart of a curve, which keeps its table."""
    import wandb

    table = wandb.Table(columns=columns, data=data)
    logger.log_metrics({key: wandb.plot.line(table, str(columns[0]), str(columns[1]), title=key)})


def log_confusion(logger: Any, stage: str, pairs: Sequence[tuple[int, int]], names: Sequence[str]) -> None:
    """A chart of how often each class was taken for which, from pairs of both."""
    import wandb

    actual, predicted = zip(*pairs, strict=True)
    chart = wandb.plot.confusion_matrix(y_true=actual, preds=predicted, class_names=names, title=stage)
    logger.log_metrics({f"{stage}/confusion_matrix": chart})

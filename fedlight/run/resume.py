"""Continuing a run: which file is read, whether it is of the same experiment, and what the folder keeps of changes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info

from fedlight.checks import check_objects, path_of
from fedlight.data.datamodule import set_up
from fedlight.data.federated import given_data
from fedlight.data.reading import class_names
from fedlight.module.optimizers import RoundSchedule
from fedlight.run.checkpoint import load_checkpoint
from fedlight.run.context import RunContext
from fedlight.run.experiment import describe, differences, plain
from fedlight.run.folder import HISTORY, RunFolder, atomic_write, versions, writing
from fedlight.run.interface import TrainerInterface
from fedlight.run.wandb import PREFIX, download
from fedlight.server.privacy import begin_privacy

T = TypeVar("T")
_OF_STATE = (
    *("algorithm", "perturbation", "trainer.personal", "trainer.views", "trainer.buffers", "trainer.precision"),
    *("data.num_clients", "data.held_out_clients", "data.partition", "model.trained"),
)


def decided(fabric: Fabric, decide: Callable[[], T]) -> T:
    """What the first process decides or reads; where it fails, it fails in every process."""
    found, failure = None, None
    if fabric.global_rank == 0:
        try:
            found = decide()
        except MisconfigurationException as error:
            failure = str(error)
    found, failure = fabric.broadcast((found, failure))
    if failure is not None:
        raise MisconfigurationException(failure)
    return cast(T, found)


def read_checkpoint(run: RunContext, wanted: str | Path) -> tuple[dict[str, Any], Path, RunFolder | None]:
    """Read ``ckpt_path``, and say in a line which file it is: its content, its path, and its run's folder, if any."""
    trainer, path = run.trainer, path_of("ckpt_path", wanted)
    if wanted in ("last", "best"):
        where = trainer.default_root_dir, trainer.name, str(wanted), trainer.run_dir
        path = decided(run.fabric, lambda: RunFolder.newest(*where).checkpoint(str(wanted)))
    elif str(wanted).startswith(PREFIX):
        path = decided(run.fabric, lambda: download(str(wanted)))
    checkpoint = decided(run.fabric, lambda: load_checkpoint(path))  # other machines may not see it
    parent = path.parent.parent if path.parent.name == "checkpoints" else path.resolve().parent.parent
    folder = RunFolder(parent) if path.resolve().parent.name == "checkpoints" else None
    round = checkpoint["fedlight"]["server"]["round"]
    if run.command != "fit":
        rank_zero_info(f"Reading {path}, written after {round} round{'s' * (round != 1)}.")
        return checkpoint, path, folder
    later = 0 if folder is None else folder.rounds() - round
    again = f"; {later} later rounds in its folder are trained again" if later > 0 else ""
    ended = f": the run is finished, as trainer.max_rounds={trainer.max_rounds}. Raise that to go on with it"
    rank_zero_info(f"Continuing {path} after round {round}{ended if round >= trainer.max_rounds else again}.")
    return checkpoint, path, folder


def usual_checkpoint(configs: Sequence[Path], root: Path, name: str) -> Path | None:
    """The checkpoint to look at where none is named: the best, else the last; None is said.

    Of configurations that were given the last one that is a run's ``config.yaml`` means that run. Otherwise the newest
    below ``trainer.default_root_dir`` and ``trainer.name`` is meant.
    """
    own = [file.parent for file in configs if file.name == "config.yaml" and (file.parent / "checkpoints").is_dir()]
    runs = own[-1:] or [root / name / f"version_{version}" for version in versions(root / name)[-1:]]
    found = [file for run in runs for kind in ("best", "last") if (file := RunFolder(run).checkpoint(kind)).exists()]
    if not found:
        rank_zero_info(f"ckpt_path: there is no checkpoint in {(*runs, root / name)[0]}, so the weights are untrained.")
    return next(iter(found), None)


def of_last_call(
    trainer: TrainerInterface, model: LightningModule | None, datamodule: Any, ckpt_path: str | Path | None
) -> tuple[LightningModule, Any, str | Path | None]:
    """What a call is about: without a module, as in Lightning, that of the call before, its data, its best checkpoint.

    Raises:
        MisconfigurationException: without a module, where there was no call before.
    """
    if model is not None:
        check_objects({"model": model})
        if not hasattr(model, "automatic_optimization"):
            name = type(model).__name__
            raise MisconfigurationException(f"model: {name} is no LightningModule, as Classifier({name}(), 10) is.")
        return model, datamodule, ckpt_path
    before: Any = vars(trainer).get("_session")
    if before is None:
        raise MisconfigurationException("model: give a module, or fit one before.")
    if ckpt_path is None and trainer.run_dir is not None:
        ckpt_path = usual_checkpoint([trainer.run_dir / "config.yaml"], trainer.default_root_dir, trainer.name)
    return before.module, datamodule or given_data(before.datamodule), ckpt_path


def set_up_data(datamodule: Any, command: str, checkpoint: dict[str, Any]) -> None:
    """Set up the data, and give it back what it had saved, under the key that Lightning has for it.

    Raises:
        MisconfigurationException: if its classes are others than those that the checkpoint's model knows.
    """
    set_up(datamodule, command)
    data = given_data(datamodule)
    if type(data).__qualname__ in checkpoint:
        data.load_state_dict(checkpoint[type(data).__qualname__])
    trained = checkpoint.get("fedlight", {}).get("experiment", {}).get("data", {}).get("classes")
    changes = differences(trained or [], class_names(data), "data.classes")
    if trained and command != "fit":  # which compares everything
        for key, (old, new) in changes.items():
            raise MisconfigurationException(
                f"{key}: the model was trained with {old}, and the data has {new}, so a number would be another class."
                " Give data with the same classes."
            )


def begin_experiment(run: RunContext, checkpoint: dict[str, Any] | None) -> bool:
    """Make the schedule, describe the experiment, and compare it with the checkpoint's.

    Returns:
        Whether what server and clients keep besides the model is of no use after what ``trainer.allow_changes`` has
        let through; the module then holds the checkpoint's model.

    Raises:
        MisconfigurationException: with a line for each difference, if there may be none.
    """
    run.schedule = RoundSchedule(run.module)
    run.experiment = describe(run)
    trainer, saved = run.trainer, checkpoint and checkpoint["fedlight"]
    parts = run.settings["transforms"], run.module, trainer.algorithm, saved
    run.federation.aggregator = run.settings["aggregator"]
    run.federation.privacy = begin_privacy(*parts, trainer.sampler, trainer.max_rounds, trainer.seed)
    if checkpoint is None:
        return False
    changes = differences(checkpoint["fedlight"].get("experiment") or _held(checkpoint), run.experiment)
    samples = [key for key in changes if key.startswith("data.samples.")]
    for key in samples["data.partition" not in changes :]:  # one of them says it
        del changes[key]
    lines = [f"{key}: {_short(old)} in the checkpoint, {_short(new)} here" for key, (old, new) in changes.items()]
    if lines and not run.settings["allow_changes"]:
        raise MisconfigurationException(
            f"ckpt_path={str(run.checkpoint_path)!r} is of another experiment:\n  " + "\n  ".join(lines) + "\nSet these"
            " back to continue it, start anew without ckpt_path, or let them change with trainer.allow_changes=true."
        )
    anew = any(key.startswith(_OF_STATE) for key in changes)
    if anew:
        lines.append("what server and clients keep besides the model begins anew")
        run.module.load_state_dict(checkpoint["state_dict"], strict=run.module.strict_loading)
    for line in lines:
        rank_zero_info(f"trainer.allow_changes: {line}.")
    run.changes = changes
    return anew


def restore_schedule(run: RunContext, checkpoint: dict[str, Any] | None) -> None:
    """Let the learning rates go on; those of another optimizer or schedule begin where they would be by now."""
    if any(key.startswith("optimizer") for key in run.changes):
        for round in range(run.trainer.current_round):
            run.schedule.advance("round", round + 1, {})
    elif checkpoint is not None:
        run.schedule.load_state_dict(checkpoint["fedlight"]["schedule"])


def _held(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint of version 0.1 says of its experiment."""
    saved, schedule = checkpoint["fedlight"], checkpoint["fedlight"]["schedule"]
    return {
        "seed_everything": saved["seed"],
        "algorithm": {"class_path": saved["algorithm"]},
        "perturbation": saved["perturbation"] and {"class_path": saved["perturbation"]},
        "trainer": {"views": saved["views"], "buffers": saved["buffers"]},
        "data": {"num_clients": saved["num_clients"]},
        "model": {"hparams": plain(checkpoint["hyper_parameters"])},
        "optimizer": {} if schedule["schedulers"] else {"groups": [{"lr": lr} for lr in schedule["lrs"]]},
    }


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def continue_files(run: RunContext, checkpoint: dict[str, Any] | None) -> None:
    """Let the run's files go on where the checkpoint is."""
    round = run.trainer.current_round
    if checkpoint is not None and run.metrics_csv is not None:
        with writing(run.metrics_csv.path):
            run.metrics_csv.resume(round, checkpoint["fedlight"].get("metrics"))
    if run.resumed and run.folder is not None and run.is_zero and round < run.trainer.max_rounds:
        record_changes(run.folder.path, round, run.changes)


def record_changes(run: Path, round: int, changes: dict[str, list[Any]]) -> None:
    """Note in ``config_history/changes.json`` what was changed from a round on; notes of later rounds are void."""
    path = run / HISTORY / "changes.json"
    try:
        noted = json.loads(path.read_text()) if path.exists() else {}
        noted = {r: c for r, c in noted.items() if int(r) < round} | ({str(round): changes} if changes else {})
    except (ValueError, AttributeError) as error:
        raise MisconfigurationException(f"{path} is damaged ({error}). It says what was changed: repair it.") from error
    with writing(path):
        (run / "summary.json").unlink(missing_ok=True)  # the run is not finished any more
        if noted:
            path.parent.mkdir(exist_ok=True)
            atomic_write(path, json.dumps(noted, indent=2).encode())
        else:
            path.unlink(missing_ok=True)

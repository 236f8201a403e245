"""What comes of trained weights: predictions, a file that needs no fedlight, and a record of their metrics."""

import csv
import fcntl
import io
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fedlight.checks import path_of
from fedlight.data.datamodule import first_samples
from fedlight.data.federated import given_data
from fedlight.data.reading import class_names
from fedlight.module.hooks import overrides
from fedlight.run.attempt import evaluating, watch
from fedlight.run.context import RunContext
from fedlight.run.folder import RunFolder, atomic_file, atomic_write, optional, writing
from fedlight.run.loggers import tell
from fedlight.seeding import derive_seed, seed_global_rng
from fedlight.server.rows import from_all


def destination(run: RunContext, output: str | Path | None = None) -> tuple[Path, str]:
    """The folder that results go to, and what their files are called after: the checkpoint.

    It is the run's; for weights of no run, ``<default_root_dir>/<name>/analysis/``.
    """
    trainer, stem = run.trainer, run.checkpoint_path.stem if run.resumed else "model"
    own = trainer.run_dir if not run.resumed else None if run.folder is None else run.folder.path
    return path_of("output", output or own or trainer.default_root_dir / trainer.name / "analysis"), stem


def keep(run: RunContext, name: str, metrics: Mapping[str, float], folder: Path, **how: Any) -> None:
    """Hand metrics of evaluated weights to the loggers, and add a record of them to ``<name>_metrics.json``.

    The file holds a list, the newest record last. One of the same checkpoint, rounds and settings is replaced; those of
    other checkpoints, or of other rounds under the same name, stay. A file that cannot be written is warned of. Of
    ``how``, settings that make a difference, None is left out. The first process calls.
    """
    rounds = run.trainer.current_round if run.resumed else None  # nobody knows what trained a module as it is
    row = {**metrics} if rounds is None else {**metrics, "round": rounds - 1.0}
    tell(run.loggers, lambda logger: logger.log_metrics(row, step=None if rounds is None else rounds - 1))
    about = {"checkpoint": checkpoint_name(run, folder), "rounds": rounds}
    about |= {key: value for key, value in how.items() if value is not None}
    path = folder / f"{name}_metrics.json"
    with optional(run, f"{path}: writing"):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # two evaluations of a run may end at the same time
            kept = json.loads(path.read_text()) if path.exists() else []
            kept = [record for record in kept if {k: v for k, v in record.items() if k != "metrics"} != about]
            RunFolder(folder).write_json(path.name, [*kept, {**about, "metrics": dict(metrics)}])
        finally:
            os.close(handle)


def checkpoint_name(run: RunContext, folder: Path) -> str | None:
    """The checkpoint's path, in its run's folder from there; None for a module as it is."""
    if not run.resumed:
        return None
    path = run.checkpoint_path.resolve()
    return str(path.relative_to(folder.resolve()) if path.is_relative_to(folder.resolve()) else path)


def predict(run: RunContext, view: str, output: str | Path | None) -> list[Any]:
    """What ``predict_step`` returns for each batch, on the CPU, in every process; the module has the view's weights.

    It is written to the folder ``output``, by default that of the run.

    Raises:
        MisconfigurationException: if there is no data to predict from, or the files cannot be written.
    """
    fabric, loaders = run.fabric, run.datamodule.predict_dataloader()
    if isinstance(loaders, list | tuple):
        if len(loaders) != 1:
            raise MisconfigurationException(
                f"data: {type(run.datamodule).__name__} has {len(loaders) or 'nothing'} to predict from: let its"
                " predict_dataloader return one loader, or give it test data."
            )
        loaders = loaders[0]
    own, alone, before = [], False, watch(run.module) if fabric.world_size > 1 else None
    with evaluating(run.module), torch.no_grad():
        run.hooks("on_predict_start")
        run.hooks("on_predict_epoch_start")
        for index, batch in _read(loaders):
            mine = index % fabric.world_size == fabric.global_rank
            # Where a batch leaves something that a later one could read, every process goes through all of them.
            if mine or index == 0 or alone:
                seed_global_rng(derive_seed(0, "evaluation", index))
                batch, call = run.evaluator.prepare(batch), run.hooks if mine else run.hooks.module_only
                call("on_predict_batch_start", batch, index)
                # Lightning's own step calls forward: with what comes before the targets
                of_pairs = not overrides(run.module, "predict_step") and isinstance(batch, list | tuple)
                found = run.evaluator.step("predict", batch[0] if of_pairs else batch, index)
                call("on_predict_batch_end", found, batch, index)
                own += [(index, move_data_to_device(found, torch.device("cpu")))] if mine else []
                alone = alone or (index == 0 and before is not None and before.changes() != [])
        run.hooks("on_predict_epoch_end")
        run.hooks("on_predict_end")
    everyone = from_all(own, fabric.world_size)
    if not any(everyone):
        raise MisconfigurationException(f"data: {type(run.datamodule).__name__}.predict_dataloader gives no batch.")
    outputs = [found for _, found in sorted((pair for part in everyone for pair in part), key=lambda pair: pair[0])]
    if run.is_zero and not run.trainer.fast_dev_run:
        _write(run, view, outputs, output)
    return outputs


def _read(loader: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Each batch and its index, on which alone depends what its samples draw."""
    seed_global_rng(derive_seed(0, "evaluation"))  # that of a loader's workers
    batches = iter(loader)
    for index in count():
        seed_global_rng(derive_seed(0, "evaluation", index))
        try:
            yield index, next(batches)
        except StopIteration:
            return


def _write(run: RunContext, view: str, outputs: list[Any], output: str | Path | None) -> None:
    """``<checkpoint>_round<n>.pt``, and where there is a number for each sample a table of them, with known names."""
    folder, stem = destination(run, output)
    where, rounds = folder if output else folder / "predictions", run.trainer.current_round if run.resumed else None
    name = stem + (f"_round{rounds}" if run.resumed else "") + (f"_{view}" if view != "server" else "")
    joined: Any = outputs
    if all(isinstance(o, Tensor) and o.ndim and o.shape[1:] == outputs[0].shape[1:] for o in outputs):
        joined = torch.cat(outputs)
    about: dict[str, Any] = {"view": view, "checkpoint": checkpoint_name(run, folder), "rounds": rounds}
    if names := _names(joined, class_names(given_data(run.datamodule))):
        about["classes"] = names
    with writing(where):
        where.mkdir(parents=True, exist_ok=True)
        with atomic_file(where / f"{name}.pt") as file:
            torch.save({"predictions": joined, **about}, file)
        if isinstance(joined, Tensor) and joined.ndim == 1:
            text = io.StringIO()
            table = csv.writer(text, lineterminator="\n")
            table.writerow(["sample", "prediction", *(["class"] if names else [])])
            for sample, value in enumerate(joined.tolist()):
                table.writerow([sample, value, *([names[value]] if names else [])])
            atomic_write(where / f"{name}.csv", text.getvalue().encode())
    print(f"predictions: {where / name}.pt", flush=True)


def _names(predictions: Any, classes: list[str]) -> list[str]:
    """The data's names of classes by number, if predictions are such numbers; else none."""
    numbers = isinstance(predictions, Tensor) and predictions.ndim == 1 and predictions.dtype == torch.int64
    if not (numbers and len(predictions) and 0 <= int(predictions.min()) <= int(predictions.max()) < len(classes)):
        return []
    return classes


def export(run: RunContext, to: Path) -> None:
    """Write the module's weights, or what its ``forward`` computes for any number of samples.

    Args:
        run: with the weights in its module.
        to: ``.pt``: the ``state_dict``; ``.pt2``: a program of ``torch.export``; ``.onnx``.

    Raises:
        MisconfigurationException: for another ending, or a module that cannot be exported this way.
    """
    if to.suffix not in (".pt", ".pt2", ".onnx"):
        raise MisconfigurationException(f"to={str(to)!r} must end in .pt (weights), .pt2 (torch.export) or .onnx.")
    if to.suffix == ".onnx" and not all(map(find_spec, ("onnx", "onnxscript"))):
        raise MisconfigurationException(f'to={str(to)!r} needs ONNX: pip install "fedlight[onnx]"')
    module = run.module.cpu()
    content: Any = module.state_dict() if to.suffix == ".pt" else _program(run, to)
    write: Any = {".pt": torch.save, ".pt2": torch.export.save, ".onnx": torch.onnx.ONNXProgram.save}[to.suffix]
    with writing(to):
        to.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(to) as file:
            write(content, file)


def _program(run: RunContext, to: Path) -> Any:
    """What ``forward`` computes, as torch or ONNX has it."""
    x = run.module.example_input_array
    if x is None:
        batch = first_samples(run.datamodule, int(run.federation.sizes.argmax()), 2)
        x = batch[0] if isinstance(batch, list | tuple) else batch
        x = None if isinstance(x, Mapping) else x  # as arguments, or as one: nobody knows
    given = ((), dict(x)) if isinstance(x, Mapping) else (x if isinstance(x, tuple) else (x,), {})
    given = move_data_to_device(run.fabric.strategy.precision.convert_input(given), torch.device("cpu"))
    sizes = [len(leaf) for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.ndim]
    about = f"to={str(to)!r}: torch cannot export {type(run.module).__name__}.forward"
    instead = "Set example_input_array in the module to what it takes: a tensor, or a tuple or dictionary of arguments."
    if not sizes:
        raise MisconfigurationException(f"{about}, as what it takes is not known. {instead}")

    def is_batch(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == sizes[0]

    batch = torch.export.Dim("batch")
    shapes = tree_map(lambda t: {0: batch} if is_batch(t) else None, (*given[0], *given[1].values()))
    # torch takes a dimension of one for a constant
    args, kwargs = tree_map(lambda t: t.expand(2, *t.shape[1:]) if is_batch(t) and len(t) == 1 else t, given)
    failed = []
    for strict in (False, True):  # the other way bears `len(x)`, and fewer kinds of Python
        try:
            with evaluating(run.module), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch about itself
                program = torch.export.export(run.module, args, kwargs, dynamic_shapes=shapes, strict=strict)
                names: Any = {} if len(shapes) > 1 else {"input_names": ["input"], "output_names": ["output"]}
                made = None if to.suffix == ".pt2" else torch.onnx.export(program, **names, dynamo=True, verbose=False)
                return program if made is None else made
        except Exception as error:
            failed.append(error)
    hint = f" {instead}" * isinstance(failed[0], TypeError)
    raise MisconfigurationException(f"{about}: {type(failed[0]).__name__}: {failed[0]}{hint}") from failed[0]

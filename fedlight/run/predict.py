"""Predictions of a view's weights, and the files that they go to."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor

from fedlight.module.hooks import overrides
from fedlight.module.step import call_step
from fedlight.run.context import RunContext
from fedlight.run.evaluation import evaluating
from fedlight.run.folder import atomic_file, atomic_write, writing
from fedlight.run.results import checkpoint_name, destination


def predict(run: RunContext, view: str, output: str | Path | None) -> list[Any]:
    """What ``predict_step`` returns for each batch, on the CPU, in every process; it is written, too.

    Args:
        run: with the view's weights in its module.
        view: whose weights they are.
        output: the folder to write to; by default that of the run.

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
    own = []
    with evaluating(run.module), torch.no_grad():
        run.hooks("on_predict_start")
        run.hooks("on_predict_epoch_start")
        for index, batch in enumerate(loaders):
            if index % fabric.world_size == fabric.global_rank:
                batch = fabric.strategy.precision.convert_input(run.evaluator.transfer(batch))
                run.hooks("on_predict_batch_start", batch, index)
                found = _step(run, batch, index)
                run.hooks("on_predict_batch_end", found, batch, index)
                own.append((index, move_data_to_device(found, torch.device("cpu"))))
        run.hooks("on_predict_epoch_end")
        run.hooks("on_predict_end")
    everyone: list[Any] = [own]
    if fabric.world_size > 1:
        everyone = [None] * fabric.world_size
        torch.distributed.all_gather_object(everyone, own)
    outputs = [found for _, found in sorted((pair for part in everyone for pair in part), key=lambda pair: pair[0])]
    if run.is_zero and not run.trainer.fast_dev_run:
        _write(run, view, outputs, output)
    return outputs


def _step(run: RunContext, batch: Any, index: int) -> Any:
    with run.fabric.strategy.precision.forward_context():
        if not overrides(run.module, "predict_step") and isinstance(batch, list | tuple):
            batch = batch[0]  # Lightning's own step calls forward: with what comes before the targets
        return call_step(run.module, "predict_step", batch, index)


def _write(run: RunContext, view: str, outputs: list[Any], output: str | Path | None) -> None:
    """``<checkpoint>_round<n>.pt``, and where there is a number for each sample a table of them."""
    folder, stem = destination(run, output)
    where, rounds = folder if output else folder / "predictions", run.trainer.current_round if run.resumed else None
    name = stem + (f"_round{rounds}" if run.resumed else "") + (f"_{view}" if view != "server" else "")
    joined: Any = outputs
    if all(isinstance(o, Tensor) and o.ndim and o.shape[1:] == outputs[0].shape[1:] for o in outputs):
        joined = torch.cat(outputs)
    about = {"view": view, "checkpoint": checkpoint_name(run, folder), "rounds": rounds}
    with writing(where):
        where.mkdir(parents=True, exist_ok=True)
        with atomic_file(where / f"{name}.pt") as file:
            torch.save({"predictions": joined, **about}, file)
        if isinstance(joined, Tensor) and joined.ndim == 1:
            rows = "".join(f"{sample},{value}\n" for sample, value in enumerate(joined.tolist()))
            atomic_write(where / f"{name}.csv", f"sample,prediction\n{rows}".encode())
    print(f"predictions: {where / name}.pt", flush=True)

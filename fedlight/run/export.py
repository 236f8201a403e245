"""A trained model as a file that needs no fedlight."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fedlight.run.context import RunContext
from fedlight.run.evaluation import evaluating
from fedlight.run.folder import atomic_file, writing
from fedlight.run.preflight import first_samples


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
    if not isinstance(x, Tensor):
        raise MisconfigurationException(
            f"to={str(to)!r}: {type(run.module).__name__}.forward is exported for one tensor, and a batch here begins"
            f" with {type(x).__name__}. Set example_input_array in the module to what forward takes."
        )
    try:
        with evaluating(run.module), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            program = torch.export.export(run.module, (x.cpu(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
            names: dict[str, Any] = {"input_names": ["input"], "output_names": ["output"]}
            return program if to.suffix == ".pt2" else torch.onnx.export(program, **names, dynamo=True, verbose=False)
    except Exception as error:
        raise MisconfigurationException(
            f"to={str(to)!r}: torch cannot export {type(run.module).__name__}.forward: {type(error).__name__}: {error}"
        ) from error

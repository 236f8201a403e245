"""What a test must leave as it found it: processes, environment variables, torch's global settings."""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import torch

# Kept alive on purpose for the life of the interpreter: they serve later tests too.
_SERVANTS = ("resource_tracker", "compile_worker", "forkserver")

# Set by Lightning (seeds, cuBLAS, NVML), CUDA, OpenMP and pytest on first use.
_ENVIRONMENT_OF_OTHERS = ("PL_", "CUBLAS_", "CUDA_", "KMP_", "OMP_", "PYTEST_", "PYTORCH_NVML_")
# Set by the compiler once, and read again as long as the interpreter lives.
_ENVIRONMENT_OF_THE_COMPILER = ("TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TRITON_")


def children() -> dict[int, str]:
    """Living child processes: id and command line."""
    if not Path("/proc/self/stat").is_file():  # not Linux
        return {p.pid: p.name for p in multiprocessing.active_children() if p.pid is not None}
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # "pid (name) state parent ..."; the name may hold anything but the last parenthesis.
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent != os.getpid():
                continue
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        if command and not any(name in command for name in _SERVANTS):  # a zombie has no command line
            found[int(folder.name)] = command
    return found


def leaked_children(before: dict[int, str], patience: float = 3.0) -> dict[int, str]:
    """Children that were not there before and do not end by themselves within ``patience`` seconds."""
    end = time.monotonic() + patience
    while leaked := {pid: command for pid, command in children().items() if pid not in before}:
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    return leaked


def changed_environment(before: dict[str, str]) -> list[str]:
    """Names of the variables that differ from ``before``, but for those that libraries set for themselves."""
    return [n for n in _differences(before) if not n.startswith(_ENVIRONMENT_OF_OTHERS)]


def restore_environment(before: dict[str, str]) -> None:
    """Set the environment back, but for what the compiler keeps there."""
    for name in _differences(before):
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


def _differences(before: dict[str, str]) -> list[str]:
    names = sorted(before.keys() | os.environ.keys())
    return [n for n in names if before.get(n) != os.environ.get(n) and not n.startswith(_ENVIRONMENT_OF_THE_COMPILER)]


def torch_settings() -> dict[str, Any]:
    """Global settings that change what other code computes."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "gradients enabled": torch.is_grad_enabled(),
    }


def restore_torch_settings(settings: dict[str, Any]) -> None:
    """Set back what :func:`torch_settings` gave."""
    torch.set_default_dtype(settings["default dtype"])
    torch.set_num_threads(settings["threads"])
    torch.set_grad_enabled(settings["gradients enabled"])
    if torch.get_default_device() != settings["default device"]:
        torch.set_default_device(settings["default device"])

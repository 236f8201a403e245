"""The program ``fedlight``, also as ``python -m fedlight``."""

import gc
import os
import signal
import sys
import threading
from typing import Any

from fedlight import loading


def main() -> None:
    """Run the command line."""
    from fedlight.cli.light import command_first, light

    sys.argv[1:] = command_first(sys.argv[1:])
    try:
        code = light(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # of `fedlight configs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    if code is not None:
        sys.exit(code)
    _run()


def _run() -> None:
    handles = threading.current_thread() is threading.main_thread()
    if interruptible := handles and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # modules that are imported may lose a KeyboardInterrupt, or crash
    asks = any(word in ("-h", "--help") or word.partition("=")[0].endswith(".help") for word in sys.argv)
    with loading():
        if asks:
            _load_few_metrics()
        from fedlight.cli.command import main as run

        gc.freeze()  # to look through all of it at the end would take a quarter of a short command's time
    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # As with `python -m`, so that a study's runs find the same classes; after what fedlight itself is made of, which a
    # file called random.py must not replace.
    if not sys.flags.safe_path and (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    run()


def _load_few_metrics() -> None:
    """Load torchmetrics without what it finds for pictures, sounds and texts, which takes half as long as torch.

    Lightning needs its classes; a process that only prints a help computes nothing with them.
    """
    from lightning_utilities.core import imports

    cls: Any = imports.RequirementCache
    left_out, own, available = (
        ("torchvision", "scipy", "matplotlib", "transformers"),
        cls.__bool__,
        imports.package_available,
    )
    cls.__bool__ = lambda self: not str(self.requirement).startswith(left_out) and own(self)
    imports.package_available = lambda name: name not in left_out and available(name)  # type: ignore[assignment]
    try:
        import torchmetrics  # noqa: F401
    finally:
        cls.__bool__, imports.package_available = own, available


if __name__ == "__main__":
    main()

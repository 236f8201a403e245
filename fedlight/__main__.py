"""The program ``fedlight``, also as ``python -m fedlight``."""

import gc
import os
import sys

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
    try:
        with loading():
            from fedlight.cli.command import main as run

            gc.freeze()  # to look through all of it at the end would take a quarter of a short command's time
    except KeyboardInterrupt:
        sys.exit(130)
    # As with `python -m`, so that a study's runs find the same classes; after what fedlight itself is made of, which a
    # file called random.py must not replace.
    if not sys.flags.safe_path and (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    run()


if __name__ == "__main__":
    main()

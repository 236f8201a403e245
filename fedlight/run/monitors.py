"""What watches a metric that nobody logs: it is refused by name, once the round that showed it is saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_warn

from fedlight.run.context import RunContext
from fedlight.run.names import nearest


@contextmanager
def monitors_known(run: RunContext) -> Iterator[None]:
    """Look whether the round has what is monitored; inside, the round is saved.

    Raises:
        MisconfigurationException: on leaving, if an evaluated round lacks it, no later one may have it, and what
            monitors it is ``strict``.
    """
    trainer, views, wrong = run.trainer, run.trainer.views, ""
    watching: list[tuple[str, Any]] = [
        ("trainer.callbacks: EarlyStopping", c) for c in trainer.callbacks if isinstance(c, EarlyStopping)
    ]
    plateaus = [s for s in run.schedule.schedulers if s.reduce_on_plateau]
    watching += [(f"model.configure_optimizers: {type(s.scheduler).__name__}", s) for s in plateaus]
    for where, what in watching:
        name = str(what.monitor)
        if views.due and name not in run.fresh and not views.may_follow(name):
            logged = sorted(n for n in run.fresh if not n.startswith("time/"))
            near = nearest(name, logged) or "."
            text = f"{where}.monitor={name!r} was not logged{near} Logged are {', '.join(logged)}."
            if what.strict and trainer.current_round < trainer.max_rounds:
                wrong = text
            else:
                rank_zero_warn(f"{text} Nothing comes of it.")
    trainer.should_stop = trainer.should_stop or bool(wrong)  # the round is saved as a last one is
    yield
    if wrong:
        saved = "" if trainer.run_dir is None else " The rounds so far are saved; --ckpt_path last goes on from there."
        raise MisconfigurationException(wrong + saved)

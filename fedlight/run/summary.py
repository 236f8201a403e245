"""What a person reads of a run: what is trained and how, before the first round; what came of it, after the last."""

import platform
import shlex
from base64 import b64encode
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info

from fedlight import __version__
from fedlight.run.context import RunContext
from fedlight.run.folder import read_summary, writing
from fedlight.run.interface import TrainerInterface
from fedlight.run.loggers import read_metrics
from fedlight.run.names import best_row
from fedlight.server.sampling import Bernoulli
from fedlight.transforms.attack import attacks_by


def facts(run: RunContext) -> dict[str, str]:
    """What a fit that is set up trains, a phrase each: method, clients, model, device, engine, its folder if any."""
    trainer, sampler, data, device = run.trainer, run.trainer.sampler, run.datamodule, run.fabric.device
    epochs = trainer.local_epochs
    work = _count(trainer.local_steps or 0, "local step") if epochs is None else _count(epochs, "local epoch")
    sizes = run.federation.sizes.tolist()
    spread = f"{min(sizes):,} / {median(sizes):,g} / {max(sizes):,} samples (min / median / max)"
    clients = f"{len(sizes)}, {sampler.clients_per_round} a round{' on average' * isinstance(sampler, Bernoulli)}; "
    frozen = sum(p.numel() for p in run.module.parameters()) - run.layout.numel
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    shares = _count(run.fabric.world_size, "process") + ", " + _count(torch.get_num_threads(), "thread") + " each"
    rounds = _count(trainer.max_rounds, "round")
    found = {
        "method": f"{trainer.method_name}, {rounds} of {work}, batches of {data.batch_size}",
        "clients": clients + spread if len(sizes) > 1 else f"all data in one place; {sum(sizes):,} samples",
        "model": f"{type(run.module).__name__}, {run.layout.numel:,} parameters{f', {frozen:,} frozen' * (frozen > 0)}",
        "device": f"{name}, {shares}, {trainer.settings['precision']}",
        "engine": f"{type(run.engine).__name__}: {run.engine.reason}",
    }
    if new := list(data.new_clients):
        found["new clients"] = f"{len(new)} never train: {', '.join(map(str, new[:20]))}{', ...' * (len(new) > 20)}"
    private, mean = run.federation.privacy, run.federation.state.personal["mean"]
    if phrase := trainer.personal.phrase(run.layout):
        seen = run.federation.clients.shows_parts and not private
        has = "the mean of the clients'" if seen else "them as they were initialised"
        found["personal"] = phrase + f"; the server's model has {has}" * (len(mean) > 0)
    if private:
        found["privacy"] = private.phrase(trainer.max_rounds, run.federation.views)
    for attack in attacks_by(run.settings["transforms"]):
        who = f"{type(attack).__name__} by {len(attack.attackers)} of {len(sizes)} clients: {sorted(attack.attackers)}"
        found["attack"] = ", ".join(filter(None, [found.get("attack"), who]))
    if run.folder is not None:
        found["folder"] = str(run.folder.path)
    if run.resumed:
        found["resumed"] = f"after round {run.first_round}, from {run.checkpoint_path}"
    return found


def say_start(run: RunContext) -> None:
    """Say what is being trained, and let the trainer know it."""
    run.trainer.facts = facts(run)
    attackers = {type(attack).__name__: sorted(attack.attackers) for attack in attacks_by(run.settings["transforms"])}
    chosen = {"held_out_clients": list(run.datamodule.new_clients), "attackers": attackers}
    for name, found in chosen.items():
        if found and run.folder is not None and run.is_zero:
            with writing(run.folder.path):
                run.folder.write_json(f"{name}.json", found)
    rank_zero_info(_lines(run.trainer.facts))


def say_end(run: RunContext, seconds: float, logged: list[str]) -> None:
    """Write ``summary.json`` and say what came of a fit that took so long, and what to type next.

    ``logged`` is what the module logs in validation.
    """
    assert run.folder is not None
    finished_before = run.trainer.current_round == run.first_round and read_summary(run.folder.path)
    with writing(run.folder.path):
        if not finished_before:
            run.folder.write_json("summary.json", _summary(run, run.folder.path, seconds, logged))
    rank_zero_info(_lines(results(run.folder.path) | next_commands(run)))


def _summary(run: RunContext, folder: Path, seconds: float, logged: list[str]) -> dict[str, Any]:
    trainer, rows, final = run.trainer, read_metrics(folder / "metrics.csv"), dict[str, float]()
    for row in rows:
        final.update(row)
    judged = logged or [n for n in final if n.startswith("val") and not n.endswith(("_selected", "_all", "_swa"))]
    names = (of for name in judged for of in (name, f"{name}_all", f"{name}_swa"))
    best = {name: {"value": top[name], "round": int(top["round"])} for name in names if (top := best_row(rows, name))}
    return {
        "final": final,
        "best": best,
        "rounds": trainer.current_round,
        "seconds": round(seconds, 3),
        "seed": trainer.seed,
        "algorithm": type(trainer.algorithm).__name__,
        "perturbation": None if trainer.perturbation is None else type(trainer.perturbation).__name__,
        "num_clients": run.federation.num_clients,
        "buffers": run.federation.clients.buffer_policy,
        "parameters": run.layout.numel,
        "device": str(run.fabric.device),
        "precision": trainer.settings["precision"],
        "engine": type(run.engine).__name__,
        "versions": {
            "fedlight": __version__,
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
    }


def say_stopped(run: RunContext) -> None:
    """Say how to go on with a run that was stopped."""
    if commands := next_commands(run):
        rank_zero_info(_lines({"stopped": f"after round {run.trainer.current_round}"} | commands))


def results(folder: Path) -> dict[str, str]:
    """What came of a run that left ``summary.json`` in its folder: metrics at the end and at best, rounds."""
    summary = read_summary(folder)
    final, best = summary["final"], summary["best"]
    shown = [name for name in best if name in final and not name.endswith(("_all", "_swa"))][:3]
    tops = {name: f"best {best[name]['value']:.4f} after round {best[name]['round'] + 1}" for name in shown}
    found = {name: f"{final[name]:.4f}, {top}" for name, top in tops.items()}
    if not shown and "train/loss" in final:
        found["train/loss"] = f"{final['train/loss']:.4f}"
    return found | {"rounds": f"{summary['rounds']} in {summary['seconds']:.0f} s", "folder": str(folder)}


def next_commands(run: RunContext) -> dict[str, str]:
    """What to type next about a run that has a ``config.yaml``: evaluate it, look at it, go on with it."""
    folder = Path() if run.folder is None else run.folder.path
    text = path.read_text(errors="replace") if (path := folder / "config.yaml").exists() else "not_written:"
    if "not_written:" in text or not (last := folder / "checkpoints" / "last.ckpt").exists():
        return {}
    config, done = shlex.quote(str(path)), run.trainer.current_round
    finished = done >= run.trainer.max_rounds
    found = {name: f"fedlight {name} -c {config}" for name in ("test", "analyze")} if finished else {}
    more = f" --trainer.max_rounds {2 * done}" * finished
    return found | {"go on": f"fedlight fit -c {config} --ckpt_path {shlex.quote(str(last))}{more}"}


class RunSummary:
    """What a trainer has trained, as text, and in a notebook as a table with the curves.

    Attributes:
        found: phrases by what they are about.
        picture: of the curves; it may not be there.
    """

    def __init__(self, trainer: TrainerInterface) -> None:
        folder = trainer.run_dir or Path("not kept")
        found = results(folder) if read_summary(folder) else {"rounds": "not finished"}
        self.found, self.picture = trainer.facts | found, folder / "plots" / "curves.png"

    def __repr__(self) -> str:
        return _lines(self.found)

    def _repr_html_(self) -> str:
        cells = [f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in self.found.items()]
        table = f"<table>{''.join(cells)}</table>"
        if self.picture.exists():
            table += f'<img src="data:image/png;base64,{b64encode(self.picture.read_bytes()).decode()}">'
        return table


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 'es' if thing.endswith('s') else 's'}"


def _lines(found: dict[str, str]) -> str:
    width = max(map(len, found), default=0)
    return "\n".join(f"{name:<{width}}  {phrase}" for name, phrase in found.items())

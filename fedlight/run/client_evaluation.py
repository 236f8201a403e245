"""Models on each client's own data: the server's, the clients' own, and those that new clients would have."""

from collections.abc import Iterator, Sequence

from lightning.pytorch.trainer.states import RunningStage

from fedlight.module.parameters import load_flat_parameters, load_tensors
from fedlight.personal.base import Personalization
from fedlight.run.context import RunContext
from fedlight.run.evaluation import client_names


def evaluate_clients(run: RunContext, clients: Sequence[int] | None = None) -> dict[int, dict[str, float]]:
    """What validation logs on each client's own data, by client; of all by default.

    The server's model, which the module holds, gives what is logged its own names. With the client's own model
    ``val/accuracy`` is ``personal_accuracy``, and ``new_accuracy`` for a client that never trains.
    """
    count, limit = run.federation.num_clients, run.settings["limit_val_batches"]
    clients = range(count + len(run.datamodule.new_clients)) if clients is None else clients
    found = run.evaluator.client_metrics(clients, limit)
    names = client_names(dict.fromkeys(name for metrics in found.values() for name in metrics))
    own = {client: metrics for client, metrics in found.items() if client >= count}
    if type(run.trainer.personal) is not Personalization:
        own = run.evaluator.client_metrics(list(found), limit, lambda clients: _in_turn(run, clients))
    for client, metrics in own.items():
        kind, before = ("new", {}) if client >= count else ("personal", found[client])
        found[client] = before | {f"{kind}_{names.get(name, name)}": value for name, value in metrics.items()}
    return found


def _in_turn(run: RunContext, clients: Sequence[int]) -> Iterator[int]:
    """Those of the clients whose rows this process has, and its share of the others, with their models in the module.

    What is trained for that is forgotten. Callbacks hear nothing of it, as of all evaluations but the server's.
    """
    federation, world = run.federation, run.fabric.world_size
    owners, side, lrs = federation.rows.owners, federation.clients, run.schedule.lrs
    mine = [c for c in clients if (owners[c] if c < len(owners) else c % world) == run.fabric.global_rank]
    side.begin(federation.state)
    together = max(1, run.trainer.sampler.clients_per_round // world)
    for some in (mine[i : i + together] for i in range(0, len(mine), together)):
        tasks = [task for client in some if (task := side.adapting(client, lrs)) is not None]
        run.hooks.quiet, run.trainer.state.stage = True, RunningStage.TRAINING
        results = {r.client: r for r in (run.engine.train(run.trainer.current_round, tasks) if tasks else ())}
        run.hooks.quiet, run.trainer.state.stage = False, RunningStage.VALIDATING
        for client in some:
            result, server = results.get(client), federation.state.views["server"]
            held = side.personal_model(client, server) if result is None else side.adapted(result)
            load_flat_parameters(run.module, held.pop(""), run.layout)
            load_tensors(run.module, held)
            yield client

"""Models on each client's own data."""

from fedlight.run.context import RunContext
from fedlight.run.evaluation import client_names


def evaluate_clients(run: RunContext) -> dict[int, dict[str, float]]:
    """What validation logs on each client's own data, by client.

    The server's model, which the module holds, gives what is logged its own names; for a client that never trains
    ``val/accuracy`` is ``new_accuracy``.
    """
    count, limit = run.federation.num_clients, run.settings["limit_val_batches"]
    found = run.evaluator.client_metrics(range(count + len(run.datamodule.new_clients)), limit)
    names = client_names(dict.fromkeys(name for metrics in found.values() for name in metrics))
    for client in [client for client in found if client >= count]:
        found[client] = {f"new_{names[name]}": value for name, value in found[client].items()}
    return found

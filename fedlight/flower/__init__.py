"""The same experiment as a real federation: a server and its sites, on Flower's engine (extra ``fedlight[flower]``)."""

from pathlib import Path
from typing import Any

from fedlight import loading


def client_app(module: str) -> Any:
    """The ClientApp of an app folder, which has ``config.yaml`` beside the Python file ``module``."""
    from flwr.clientapp import ClientApp

    with loading():  # the process may be new for every message
        from fedlight.flower.transport import from_message, to_reply

    app = ClientApp()

    def handle(message: Any, context: Any) -> Any:
        with loading():
            from fedlight.flower.client import answer

        found = answer(from_message(message), Path(module).with_name("config.yaml"), context.node_config)
        return to_reply(found, message)

    for kind in (app.query, app.train, app.evaluate):
        kind()(handle)
    return app


def server_app(module: str) -> Any:
    """The ServerApp of an app folder, which has ``config.yaml`` beside the Python file ``module``."""
    from flwr.serverapp import ServerApp

    app = ServerApp()

    def main(grid: Any, context: Any) -> None:
        from fedlight.flower.server import serve
        from fedlight.flower.transport import FlowerTransport

        serve(Path(module).with_name("config.yaml"), context.run_config, FlowerTransport(grid))

    app.main()(main)
    return app

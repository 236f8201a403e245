"""What a site keeps of its clients between messages, until the server says which of it counts."""

import re
from pathlib import Path
from typing import Any

import torch

from fedlight.run.folder import atomic_file
from fedlight.server.clients import Row

_FILE = re.compile(r"round_(\d+)\.pt")


class SiteState:
    """The rows of one client, a file for each round that it trained in.

    A reply may be lost, so that the server goes on without it; or the server may be started again from an earlier
    checkpoint. So nothing is overwritten: the server says with every message after which round the client's state is
    the one that counts, and which rounds it can no longer go back to.

    Args:
        folder: the site's.
        experiment: the run's id.
        client: its index.
    """

    def __init__(self, folder: Path, experiment: str, client: int) -> None:
        if not re.fullmatch("[0-9a-f]{32}", experiment):
            raise ValueError(f"the id of a run must be 32 hexadecimal digits, and {experiment!r} is not")
        self._folder, self._client = folder / experiment / f"client_{client}", client

    def _file(self, round: int) -> Path:
        return self._folder / f"round_{round}.pt"

    def load(self, round: int) -> Row:
        """The rows after a round; none before the first one, -1.

        Raises:
            FileNotFoundError: if they are not there.
        """
        if round < 0:
            return {}
        if not self._file(round).exists():
            raise FileNotFoundError(
                f"client {self._client}: its state after round {round + 1} is not in {self._folder}. Start the"
                " node with the `state` folder that it had, or the run anew."
            )
        found: dict[str, Any] = torch.load(self._file(round), weights_only=True)
        return found

    def save(self, round: int, row: Row, keep: int) -> None:
        """Keep the rows after a round, and those from round ``keep`` on."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._file(round)) as file:
            torch.save({part: {k: v.cpu() for k, v in state.items()} for part, state in row.items() if state}, file)
        for path in self._folder.iterdir():
            if (match := _FILE.fullmatch(path.name)) and int(match[1]) < keep:
                path.unlink()

"""Texts in memory, divided among clients."""

import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor

from fedlight.checks import check_number, check_whole
from fedlight.data.arrays import ArrayDataset
from fedlight.data.federated import draw_clients
from fedlight.data.images import held_out_for_test, holdout, say_shared
from fedlight.data.label_skew import DirichletClients
from fedlight.data.partition import IID, NaturalGroups, Partitioner
from fedlight.data.partitioned import PartitionedDataModule
from fedlight.data.tables import Table, coded, column, read_tables
from fedlight.seeding import generator

_UNKNOWN = 1
"""The number of what is not in the vocabulary; 0 is padding."""


class TextData(PartitionedDataModule):
    """Texts with labels, or without, as numbers of a fixed length in memory, divided among clients.

    Batches are ``(ids [B, L], labels [B])``, with 0 as padding; or with ``as_dict`` ``input_ids``, ``attention_mask``
    and ``labels``, as models of Hugging Face take them. The vocabulary is made of the training texts alone.
    Checkpoints hold it and the labels' names, and what is evaluated with one is read with these.

    Args:
        source: a CSV, TSV, JSON, JSON-lines or Parquet file, or a folder with one for each split; a folder of LEAF;
            folders ``<label>/*.txt`` or ``<client>/<label>/*.txt``, with or without splits; a folder that a Hugging
            Face dataset was saved to, such a dataset, or a mapping with one for each split.
        text: the column of the texts.
        label: the column of the labels; null for language models, whose labels are the ids themselves, and -100 where
            there is padding.
        client: the column that says whose a text is, for natural clients (``client`` in folders and LEAF).
        tokenizer: ``words``, ``chars``, ``hash`` (words by a hash, without a vocabulary), a tokenizer of Hugging Face,
            or a function of a text that returns its numbers.
        max_length: L; longer texts are cut.
        vocab_size: numbers of ``words``, ``chars`` and ``hash``, 0 for padding and 1 for what is unknown among them.
        next_token: the label is the token that follows the text, as in LEAF's Shakespeare, and is numbered as they are.
        as_dict: whether batches are dictionaries.
        num_clients: N; by default one per natural client, or 20.
        partitioner: which client gets which texts; by default natural clients, else ``DirichletClients()``, or
            ``IID()`` where there are no labels.
        min_samples: natural clients with fewer texts are left out.
        val_fraction: share of the training texts that is held out for validation; 0: the test set is that, too.
        test_fraction: share that becomes the test set where the source has none.
        batch_size: texts of a batch in local training.
        eval_batch_size: texts of a batch in evaluation; by default 256.
        seed: seed of the partition and of what is held out.
        held_out_clients: clients that never train, a number or a fraction of all, and are evaluated as new ones.

    Attributes:
        classes: names of the labels.
        vocabulary: what the numbers from 2 on stand for, of ``words`` and ``chars``.
    """

    def __init__(
        self,
        source: Any,
        text: str = "text",
        label: str | None = "label",
        client: str | None = None,
        tokenizer: Literal["words", "chars", "hash"] | Callable[..., Any] = "words",
        max_length: int = 128,
        vocab_size: int = 4096,
        next_token: bool = False,
        as_dict: bool = False,
        num_clients: int | None = None,
        partitioner: Partitioner | None = None,
        min_samples: int = 1,
        val_fraction: float = 0.0,
        test_fraction: float = 0.2,
        batch_size: int = 32,
        eval_batch_size: int | None = 256,
        seed: int = 0,
        held_out_clients: int | float = 0,
    ) -> None:
        usual = NaturalGroups() if client else DirichletClients() if label and not next_token else IID()
        clients = num_clients or (None if isinstance(partitioner or usual, NaturalGroups) else 20)
        more = {"seed": seed, "held_out_clients": held_out_clients}
        super().__init__(clients, partitioner or usual, batch_size, eval_batch_size, **more)
        self.max_length = check_whole("`data.max_length`", max_length)
        check_whole("`data.vocab_size`", vocab_size, 3)
        check_number("`data.val_fraction`", val_fraction, below=1)
        if next_token and (label is None or tokenizer not in ("words", "chars")):
            raise ValueError("`data.next_token` needs `data.label`, and `data.tokenizer` words or chars.")
        self.source, self.tokenizer, self.vocab_size = source, tokenizer, vocab_size
        self.next_token, self.as_dict, self.min_samples = next_token, as_dict, min_samples
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self._names = {"text": text, "label": label, "client": client}
        self.classes: list[str] = []
        self.vocabulary: list[str] = []
        self._restored = False

    def setup(self, stage: str | None = None) -> None:
        """Read the texts, hold out what is for evaluation, and divide the rest among the clients."""
        if self.partition is None or self._restored:
            self._prepare([], [])

    def _prepare(self, words: list[str], classes: list[str]) -> None:
        """Read and divide the texts; with a vocabulary and names of labels, or those that are found."""
        self._restored = bool(words or classes)
        table, split = self._read()
        natural, labelled = self._names["client"] is not None, self._names["label"] is not None
        clients, strata = (torch.from_numpy(np.unique(table[k], return_inverse=True)[1]) for k in ("client", "label"))
        strata = clients if natural else strata
        train, val, test = (torch.from_numpy(np.flatnonzero(split == kind)) for kind in ("train", "val", "test"))
        if len(val) + len(test) == 0:
            kept, out = held_out_for_test(strata[train], self.test_fraction)
            train, test = train[kept], train[out]
        val, test = val if len(val) else test, test if len(test) else val
        if self.val_fraction > 0:
            kept, out = holdout(strata[train], self.val_fraction, generator(self.seed, "validation split"))
            train, val = train[kept], train[out]
        if not (len(train) and len(val)):
            raise ValueError(f"`data.source`: {len(train)} texts for training and {len(val)} held out are too few.")
        targets = None
        if labelled and not self.next_token:
            known = classes or {table["label"][row] for row in train.tolist()}
            labels, self.classes = coded(table["label"], known, f"`data.label` ({self._names['label']})")
            targets = labels[train], labels[val]
        groups = (clients[train], clients[val]) if natural else None
        self.divide(len(train), targets and targets[0], len(self.classes), groups and groups[0])
        self.stratify(targets, groups)
        if not words and self.tokenizer in ("words", "chars"):
            rows = train[torch.cat([self.client_rows(client) for client in draw_clients(self)[0]])]
            counts = Counter(piece for row in rows for piece in _pieces(table["text"][row], str(self.tokenizer)))
            words = sorted(counts, key=lambda piece: (-counts[piece], piece))[: self.vocab_size - 2]  # as they sort
        self.vocabulary = words
        numbers = self.tokenizer, self.vocabulary, self.vocab_size
        ids, mask = _encoded(table["text"], *numbers, self.max_length)
        if not targets:
            labels = _encoded(table["label"], *numbers, 1)[0][:, 0] if labelled else ids.where(mask, -100)
        batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
        stored = ArrayDataset.of(batch) if self.as_dict else ArrayDataset(ids, labels)
        self._train, self._val, self._test = (stored.view(rows, None) for rows in (train, val, test))
        said = f"data: {len(train)} training and {len(test)} test texts of {self.num_clients} clients"
        names = ", ".join(self.classes[:5]) + ", and others" * (len(self.classes) > 5)
        rank_zero_info(said + (f"; {len(self.classes)} labels: {names}." if names else "."))
        trained, tested = ([table["text"][row] for row in rows] for rows in (train, test))
        say_shared("data: {} test texts are training texts", trained, tested)
        if self.next_token and self.tokenizer == "chars":  # windows of one text
            held = [table["text"][row] for row in {*val.tolist(), *test.tolist()}]
            known, ends = {*held}, (table["label"][row] for row in train)
            later = (f"{text}{end}"[1:] for text, end in zip(trained, ends, strict=True))
            said = "data: {} held-out windows are in training, one character later"
            say_shared(said, (text for text in later if text in known), held)

    def _read(self) -> tuple[Table, np.ndarray[Any, Any]]:
        """All texts with labels and clients, in one table, and the split of each."""
        tables = read_tables(self.source, self.test_fraction)
        table: Table = {"text": [], "label": [], "client": []}
        for kind, read in tables.items():
            for key, name in self._names.items():
                found = [""] * len(next(iter(read.values())))
                if name is not None and (key != "client" or kind == "train" or name in read):
                    found = column(read, name, key, f" ({kind})" * (kind != "train"))
                table[key] += found if key == "text" else map(str, found)
        split = np.repeat([*tables], [len(next(iter(read.values()))) for read in tables.values()])
        empty = [i for i, text in enumerate(table["text"]) if not (isinstance(text, str) and text.strip())]
        if empty:
            raise ValueError(f"`data.text`: {len(empty)} texts are empty, or no texts; the first is sample {empty[0]}.")
        clients, sizes = np.unique(np.array(table["client"])[split == "train"], return_counts=True)
        small = {*clients[sizes < self.min_samples]}
        chosen = [client not in small for client in table["client"]]
        if len(small) == len(clients):
            why = f"no client has so many texts; at most {max(sizes)}."
            raise ValueError(f"`data.min_samples`={self.min_samples}: {why}")
        return {k: list(compress(v, chosen)) for k, v in table.items()}, split[chosen]

    def state_dict(self) -> dict[str, Any]:
        """The vocabulary and the names of the labels, for checkpoints."""
        return {"vocabulary": self.vocabulary, "classes": self.classes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint's numbers; texts and labels that were read with others are read anew, until next time."""
        if self.state_dict() != state_dict:
            self._prepare(state_dict["vocabulary"], state_dict["classes"])


def _pieces(text: str, kind: str) -> Sequence[str]:
    """Characters; or words and signs, in lower case."""
    return text if kind == "chars" else re.findall(r"\w+|[^\w\s]", text.lower())


def _encoded(
    texts: Sequence[str], tokenizer: str | Callable[..., Any], known: Sequence[str], size: int, longest: int
) -> tuple[Tensor, Tensor]:
    """The numbers of texts ``[n, L]`` int64, cut or padded, and which are text and not padding, ``[n, L]`` bool."""
    number, padding = {piece: i for i, piece in enumerate(known, start=2)}, 0

    def numbers(text: str) -> Any:
        if tokenizer == "hash":
            pieces = [piece.encode(errors="surrogatepass") for piece in _pieces(text, "words")[:longest]]
            return [2 + zlib.crc32(piece) % (size - 2) for piece in pieces]
        if isinstance(tokenizer, str):
            return [number.get(piece, _UNKNOWN) for piece in _pieces(text, tokenizer)[:longest]]
        found = tokenizer(text, **cut)
        row = np.asarray(found["input_ids"] if hasattr(found, "keys") else getattr(found, "ids", found))
        row = row[0] if row.shape[:-1] == (1,) else row  # a batch of one text
        if row.ndim != 1 or (len(row) and (row.dtype.kind not in "iu" or row.min() < 0)):
            what = f"{found!r:.60} of a text; it must give the numbers of its pieces, as [5, 2, 9]"
            raise ValueError(f"`data.tokenizer` gives {what}.")
        return row[:longest]

    cut: dict[str, Any] = {}
    if hasattr(tokenizer, "pad_token_id"):
        padding, cut = tokenizer.pad_token_id or 0, {"truncation": True, "max_length": longest}
    ids, mask = torch.full((len(texts), longest), padding), torch.zeros(len(texts), longest, dtype=torch.bool)
    for i, text in enumerate(texts):
        row = torch.as_tensor(numbers(text), dtype=torch.int64)
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    return ids, mask

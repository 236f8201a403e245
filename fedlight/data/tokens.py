"""Texts as rows of numbers: words, characters or hashes of words, or what any tokenizer makes of them."""

import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

UNKNOWN = 1
"""The number of what is not in the vocabulary; 0 is padding."""
KINDS = ("words", "chars", "hash")


def pieces(text: str, kind: str) -> Sequence[str]:
    """Characters; or words and signs, in lower case."""
    return text if kind == "chars" else re.findall(r"\w+|[^\w\s]", text.lower())


def vocabulary(texts: Sequence[str], kind: str, size: int) -> list[str]:
    """The most frequent pieces, ``size`` − 2 of them; those as frequent as they sort."""
    counts = Counter(piece for text in texts for piece in pieces(text, kind))
    return sorted(counts, key=lambda piece: (-counts[piece], piece))[: size - 2]


def encode(
    texts: Sequence[str], tokenizer: str | Callable[..., Any], known: Sequence[str], size: int, longest: int
) -> tuple[Tensor, Tensor]:
    """The numbers of texts ``[n, L]`` int64, cut or padded, and which are text and not padding, ``[n, L]`` bool.

    Args:
        texts: n of them.
        tokenizer: one of :data:`KINDS`, a tokenizer of Hugging Face, or a function of a text that returns its numbers.
        known: the vocabulary of ``words`` and ``chars``.
        size: one more than the largest number.
        longest: L.

    Raises:
        ValueError: for a number outside of ``0 .. size - 1``.
    """
    number, padding = {piece: i for i, piece in enumerate(known, start=2)}, 0

    def numbers(text: str) -> Any:
        if tokenizer == "hash":
            return [2 + zlib.crc32(piece.encode()) % (size - 2) for piece in pieces(text, "words")[:longest]]
        if isinstance(tokenizer, str):
            return [number.get(piece, UNKNOWN) for piece in pieces(text, tokenizer)[:longest]]
        found = tokenizer(text, **cut)
        return (found["input_ids"] if hasattr(found, "keys") else found)[:longest]

    cut: dict[str, Any] = {}
    if hasattr(tokenizer, "pad_token_id"):
        padding, cut = tokenizer.pad_token_id or 0, {"truncation": True, "max_length": longest}
    ids, mask = torch.full((len(texts), longest), padding), torch.zeros(len(texts), longest, dtype=torch.bool)
    for i, text in enumerate(texts):
        row = torch.as_tensor(numbers(text), dtype=torch.int64)
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    return ids, mask

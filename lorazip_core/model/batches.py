"""Examples side by side, padded: which positions of the model tell of which answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .prompts import Example

_TOKENS = 2048  # of a batch, with its padding
_LOGITS = 2**26  # elements of the logits that are wanted of a batch


class Batch(NamedTuple):
    """Ids [n, t] of int64, padded on the right, where no causal model looks; ``mask`` [n, t] is 1 for tokens."""

    places: list[int]
    """Where the rows are among the examples."""
    ids: Tensor
    mask: Tensor
    wanted: range
    """The positions whose logits are wanted: they cover those that predict the answers of all rows."""
    answers: list[slice]
    """By row, where within ``wanted`` the logits are that predict its answer."""
    targets: list[Tensor]
    """By row, the tokens of its answer."""


def batches(examples: Sequence[Example], vocabulary: int, device: torch.device) -> Iterator[Batch]:
    """All examples, those of equal length together."""
    order = sorted(range(len(examples)), key=lambda place: (examples[place].prompt, len(examples[place].ids)))
    some: list[int] = []
    for place in order:
        if some and _too_large([examples[each] for each in (*some, place)], vocabulary):
            yield _batch(examples, some, device)
            some = []
        some.append(place)
    if some:
        yield _batch(examples, some, device)


def equal_lengths(examples: Sequence[Example], device: torch.device) -> Iterator[Tensor]:
    """Ids [n, t] of all examples without any padding: only such of one length are together."""
    order = sorted(range(len(examples)), key=lambda place: len(examples[place].ids))
    some: list[tuple[int, ...]] = []
    for ids in (examples[place].ids for place in order):
        if some and (len(ids) != len(some[0]) or len(ids) * (len(some) + 1) > _TOKENS):
            yield torch.tensor(some, device=device)
            some = []
        some.append(ids)
    if some:
        yield torch.tensor(some, device=device)


def _too_large(examples: list[Example], vocabulary: int) -> bool:
    longest = max(len(example.ids) for example in examples)
    logits = len(_wanted(examples)) * len(examples) * vocabulary
    return longest * len(examples) > _TOKENS or logits > _LOGITS


def _wanted(examples: list[Example]) -> range:
    """Position p predicts the token at p + 1."""
    return range(min(each.prompt for each in examples) - 1, max(len(each.ids) for each in examples) - 1)


def _batch(examples: Sequence[Example], places: list[int], device: torch.device) -> Batch:
    rows = [examples[place] for place in places]
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        mask[number, : len(row.ids)] = 1
    wanted = _wanted(rows)
    answers = [slice(row.prompt - 1 - wanted.start, len(row.ids) - 1 - wanted.start) for row in rows]
    targets = [torch.tensor(row.ids[row.prompt :], device=device) for row in rows]
    return Batch(places, ids.to(device), mask.to(device), wanted, answers, targets)

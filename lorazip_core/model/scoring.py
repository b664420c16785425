"""Answers compared, row by row: which tokens are the likeliest, how likely the wanted ones are, how far two differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from ..base.stopping import check_stop
from .base_model import BaseModel
from .batches import batches
from .hooks import Updates, applied
from .prompts import Example

Said = Callable[[int], None]


class Scores(NamedTuple):
    """Of n rows, each an array [n]: of the one model, and of the other against it."""

    matches: numpy.ndarray
    """bool: every answer token is the argmax given the ones before it, as in greedy decoding."""
    loss: numpy.ndarray
    """float64: −Σ log p of the answer tokens, in nats."""


def score(base: BaseModel, examples: Sequence[Example], told: Said) -> Scores:
    """The model as it is. ``told`` hears how many rows are done."""
    scores = _nothing(len(examples))
    with torch.inference_mode():
        for batch in batches(examples, base.vocabulary, base.device):
            check_stop()
            logits = base.logits(batch.ids, batch.mask, batch.wanted)
            for place, row, where, target in zip(batch.places, logits, batch.answers, batch.targets, strict=True):
                _put(scores, place, _log_probabilities(row[where]), target)
            told(len(batch.places))
    return scores


def compare(
    base: BaseModel, examples: Sequence[Example], original: Updates, compressed: Updates, told: Said
) -> tuple[Scores, Scores, numpy.ndarray]:
    """The model with one update and with another, and by row Σ KL(original ‖ compressed) over its answer tokens.

    The divergence is over the whole vocabulary, in float64, so that equal logits are at 0 exactly. The logits of a
    batch are all that is held.
    """
    one, other = _nothing(len(examples)), _nothing(len(examples))
    divergence = numpy.zeros(len(examples))
    with torch.inference_mode():
        for batch in batches(examples, base.vocabulary, base.device):
            check_stop()
            with applied(base.model, original):
                of_original = base.logits(batch.ids, batch.mask, batch.wanted)
            check_stop()
            with applied(base.model, compressed):
                of_compressed = base.logits(batch.ids, batch.mask, batch.wanted)
            for number, (place, where, target) in enumerate(
                zip(batch.places, batch.answers, batch.targets, strict=True)
            ):
                p = _log_probabilities(of_original[number, where])
                q = _log_probabilities(of_compressed[number, where])
                _put(one, place, p, target)
                _put(other, place, q, target)
                divergence[place] = float(_divergence(p, q).sum())
            told(len(batch.places))
    return one, other, divergence


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL of each token, of log p and log q [answer tokens, vocabulary]."""
    share = p.exp()
    terms = torch.where(share > 0, share * (p - q), 0.0)  # what a model excludes altogether is no difference
    return terms.sum(-1).clamp_min(0)  # rounding may leave a sum of −1e-16


def _nothing(rows: int) -> Scores:
    return Scores(numpy.zeros(rows, bool), numpy.zeros(rows))


def _put(scores: Scores, place: int, log_probabilities: Tensor, target: Tensor) -> None:
    scores.matches[place] = bool((log_probabilities.argmax(-1) == target).all())
    scores.loss[place] = -float(log_probabilities.gather(-1, target[:, None]).sum())


def _log_probabilities(logits: Tensor) -> Tensor:
    """[answer tokens, vocabulary] in float64."""
    return logits.double().log_softmax(-1)

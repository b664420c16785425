"""Adapter after adapter on one base model: what it answers with the original and with what a bundle has of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy

from ..adapter.module import Module
from ..base.progress import Progress
from ..bundle.manifest import SkippedEntry
from .base_model import BaseModel
from .bootstrap import SAMPLES, interval, resampled
from .fitting import misfit
from .hooks import Updates, on_device
from .prompts import Example, Prompts
from .report import AdapterAnswers, AnswersSummary, OfEach
from .rows import Rows
from .scoring import Scores, compare, score


class Candidate(NamedTuple):
    """An adapter to judge. Its two updates are read when it is its turn."""

    name: str
    modules: Sequence[Module]
    original: Callable[[], Updates]
    compressed: Callable[[], Updates]
    unfit: str | None = None
    """Why it cannot be put on any model, if that is known."""


class Judged(NamedTuple):
    """Adapters by what came of them; ``summary`` is None if none was scored."""

    adapters: list[AdapterAnswers]
    not_scored: list[SkippedEntry]
    summary: AnswersSummary | None


def judge(
    base: BaseModel, candidates: Sequence[Candidate], rows: Rows, *, prompt_tokens: int, progress: Progress
) -> Judged:
    """Score every one of ``candidates`` over its rows, of which each has some.

    The base model alone answers every row once, whichever adapters it is for. Raises UsageError for a row that is no
    question to this model.
    """
    prompts = Prompts(base.tokenizer, prompt_tokens)
    unfit = {each.name: each.unfit or misfit(base.model, each.modules) for each in candidates}
    able = [each for each in candidates if unfit[each.name] is None]
    not_scored = [SkippedEntry(name, reason) for name, reason in unfit.items() if reason is not None]
    examples = {each.name: [prompts.example(row) for row in rows.of(each.name)] for each in able}
    distinct = list(dict.fromkeys(example for own in examples.values() for example in own))
    base.check_length(distinct)
    scored: list[AdapterAnswers] = []
    samples = numpy.zeros((2, SAMPLES))
    with progress.stage("asking the model", len(distinct) + 2 * sum(map(len, examples.values()))) as advance:
        alone = score(base, distinct, advance)
        places = {example: place for place, example in enumerate(distinct)}
        for each in able:
            own = examples[each.name]
            updates = [on_device(read(), base.device, base.dtype) for read in (each.original, each.compressed)]
            of_both = compare(base, own, updates[0], updates[1], lambda count: advance(2 * count))
            some = [places[example] for example in own]
            of_base = Scores(alone.matches[some], alone.loss[some])
            if not all(numpy.isfinite(loss).all() for loss in (of_base.loss, *(s.loss for s in of_both[:2]))):
                not_scored.append(SkippedEntry(each.name, "the model answers it with NaN or Inf"))
                continue
            drawn = resampled(each.name, of_both[0].matches, of_both[1].matches)
            samples += drawn
            scored.append(_answers(each.name, own, of_base, of_both, drawn))
    return Judged(scored, not_scored, _summary(scored, samples))


def _answers(
    name: str,
    examples: list[Example],
    base: Scores,
    of_both: tuple[Scores, Scores, numpy.ndarray],
    drawn: numpy.ndarray,
) -> AdapterAnswers:
    original, compressed, divergence = of_both
    tokens = sum(example.answer for example in examples)
    three = (base, original, compressed)
    exact = OfEach(*(float(scores.matches.mean()) for scores in three))
    kept = exact.compressed / exact.original if exact.original else None
    return AdapterAnswers(
        name=name,
        rows=len(examples),
        answer_tokens=tokens,
        cut_prompts=sum(example.cut for example in examples),
        exact_match=exact,
        loss=OfEach(*(float(scores.loss.sum()) / tokens for scores in three)),
        kl=float(divergence.sum()) / tokens,
        kept=kept,
        kept_interval=None if kept is None else interval(drawn),
    )


def _summary(scored: Sequence[AdapterAnswers], samples: numpy.ndarray) -> AnswersSummary | None:
    if not scored:
        return None
    exact = _mean([each.exact_match for each in scored])
    worst = max(scored, key=lambda each: each.kl)
    kept = exact.compressed / exact.original if exact.original else None
    return AnswersSummary(
        adapters=len(scored),
        rows=sum(each.rows for each in scored),
        exact_match=exact,
        loss=_mean([each.loss for each in scored]),
        mean_kl=math.fsum(each.kl for each in scored) / len(scored),
        max_kl=worst.kl,
        worst_adapter=worst.name,
        kept=kept,
        kept_interval=None if kept is None else interval(samples),
    )


def _mean(each: Sequence[OfEach]) -> OfEach:
    fields = ("base", "original", "compressed")
    return OfEach(*(math.fsum(getattr(one, field) for one in each) / len(each) for field in fields))

"""What a model answered with the originals and with what a bundle has of them. Nothing here loads torch."""

from __future__ import annotations

from msgspec import Struct

from ..bundle.manifest import SkippedEntry
from .options import ModelDtype


class OfEach(Struct, frozen=True):
    """A figure of the base model alone, with the original adapter, and with the compressed one."""

    base: float
    original: float
    compressed: float


class AdapterAnswers(Struct, frozen=True, kw_only=True):
    """What compression did to the answers of one adapter, over its rows."""

    name: str
    rows: int
    answer_tokens: int
    cut_prompts: int
    """Rows whose prompt was longer than the limit, and lost its middle."""
    exact_match: OfEach
    """Share of rows whose every answer token, the end of the turn included, is the likeliest given those before it."""
    loss: OfEach
    """Mean negative log-likelihood of the answer tokens, in nats."""
    kl: float
    """Mean over answer tokens of KL(original ‖ compressed), in nats; 0 where nothing has changed."""
    kept: float | None
    """Exact match compressed / original; null where the original answers no row."""
    kept_interval: tuple[float, float] | None
    """95% interval of ``kept``, by a paired bootstrap over rows."""


class AnswersSummary(Struct, frozen=True, kw_only=True):
    """The same of all adapters that were scored; means are over adapters."""

    adapters: int
    rows: int
    exact_match: OfEach
    loss: OfEach
    mean_kl: float
    max_kl: float
    worst_adapter: str
    """The one with the largest ``kl``."""
    kept: float | None
    """Mean exact match compressed / mean exact match of the originals."""
    kept_interval: tuple[float, float] | None


class ModelReport(Struct, frozen=True, kw_only=True):
    """What the base model answers with the originals and with what the bundle has of them."""

    model: str
    rows: str
    dtype: ModelDtype
    prompt_tokens: int
    adapters: list[AdapterAnswers]
    not_scored: list[SkippedEntry]
    """Adapters with rows that cannot be put on the model, and why; each is a finding, too."""
    without_rows: list[str]
    unknown: list[str]
    """Names in the rows that the bundle has no adapter of."""
    summary: AnswersSummary | None
    """Null if no adapter could be scored."""

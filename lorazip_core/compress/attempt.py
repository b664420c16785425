"""How much to keep of all adapters so that a bundle meets a budget or a mean error: planned, tried, and corrected."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..base.errors import UsageError
from ..bundle.manifest import Manifest
from ..planning.options import CompressOptions
from ..planning.spectra import COARSEST, FINEST, Outlook, Spectra
from ..reading.scan import Scan
from ..schemes.scheme import Counting, SteppedScheme

_AIM = 0.9985
"""Of what is allowed: a prediction that knows of an attempt nearby is right to about 0.1%."""
_NEAR = 0.98
"""Of what is allowed. Less is left unused only if nothing in between was found."""
_REST = {
    "disk": "names, configurations and what is no LoRA factor take",
    "resident": "what tells where codes are takes",
}
"""What bytes there are besides those of updates."""
_MOST = 4
"""Attempts, and one more if none of them met the bound. What they learn is nearly exact: more than two are rare."""


class Taken(NamedTuple):
    """What an attempt has led to, in the bytes that are counted."""

    bytes: int
    of_updates: int
    """Those that the step decides."""
    besides: int
    """Those that no scheme can spare."""


@dataclass(frozen=True)
class Attempt:
    """To keep as much as ``step`` says, a share of each adapter's √Σ‖ΔW‖²."""

    number: int
    step: float
    spectra: Spectra
    scheme: SteppedScheme
    counting: Counting
    max_bytes: int | None
    max_mean: float | None
    asked: str
    """The bound, in words."""
    best: tuple[float, Attempt] | None = None
    """Of those before that met the bound, the one that used most of it, and which share."""
    beyond: float | None = None
    """The last step that did not meet the bound."""
    settled: bool = False
    """Whether this is the best of several, made once more."""

    @property
    def predicted_bytes(self) -> float:
        """Of the tensors of all adapters."""
        return float(self._outlook.bytes.sum())

    @property
    def predicted_mean(self) -> float:
        """The mean squared error."""
        return float(self._outlook.squared_errors.mean())

    @property
    def _outlook(self) -> Outlook:
        return self.spectra.outlook(self.scheme, self.step, self.counting)

    @property
    def _easiest(self) -> float:
        """The step that meets the bound if any does."""
        return COARSEST if self.max_bytes is not None else FINEST

    def following(self, manifest: Manifest, taken: Taken) -> Attempt | None:
        """What to try after an attempt that led to this bundle; None if it is good.

        Raises UsageError if nothing meets the bound.
        """
        errors = [adapter.squared_error for adapter in manifest.adapters]
        mean = sum(errors) / len(errors)
        used = taken.bytes / self.max_bytes if self.max_bytes else mean / (self.max_mean or 1)
        if self.settled or _NEAR <= used <= 1:
            return None
        best, beyond = self.best, self.beyond
        if used > 1:
            beyond = self.step
        elif best is None or used > best[0]:
            best = used, self
        if used > 1 and self.step == self._easiest:
            raise self._unmet(taken, mean)
        step = self._better(taken, mean)
        if best and beyond and not min(best[1].step, beyond) < step < max(best[1].step, beyond):
            step = math.sqrt(best[1].step * beyond)
        onwards = step > self.step if (used > 1) == (self.max_bytes is not None) else step < self.step
        if self.number + 1 < _MOST and onwards:
            return replace(self, number=self.number + 1, step=step, best=best, beyond=beyond)
        if best is None:
            return replace(self, number=self.number + 1, step=self._easiest, beyond=beyond)
        return None if best[1] is self else replace(best[1], settled=True)

    def _better(self, taken: Taken, mean: float) -> float:
        """A step that meets the bound by what this attempt has shown of predictions."""
        if self.max_bytes is None:
            assert self.max_mean is not None
            aim = _AIM * self.max_mean * self.predicted_mean / mean if mean else self.max_mean
            return self.spectra.step_for_mean(self.scheme, aim, self.counting)
        if not taken.of_updates:
            return self._easiest
        left = max(_AIM * self.max_bytes - (taken.bytes - taken.of_updates), 0.0)
        return self.spectra.step_for_bytes(self.scheme, left * self.predicted_bytes / taken.of_updates, self.counting)

    def _unmet(self, taken: Taken, mean: float) -> UsageError:
        if self.max_bytes is None:
            told = f"{self.scheme.name} gets no further than {mean:.4g}"
        elif taken.besides >= self.max_bytes:
            told = f"{_REST[self.counting.objective]} {taken.besides:,} bytes"
        else:
            told = f"{self.scheme.name} gets no further than {taken.bytes:,} bytes"
        return UsageError(f"{self.asked}: {told}", "allow more")


def first_attempt(spectra: Spectra, scanned: Scan, step: float, options: CompressOptions) -> Attempt:
    """With the ``step`` that the singular values of all updates ask for."""
    scheme = options.scheme
    assert isinstance(scheme, SteppedScheme)
    count = len(scanned.collection.adapters)
    most = options.most_bytes(count)
    return Attempt(0, step, spectra, scheme, options.counting, most, options.max_mean_error, _asked(options, count))


def _asked(options: CompressOptions, adapters: int) -> str:
    if options.budget_per_adapter is not None:
        each = f"«budget_per_adapter» {options.budget_per_adapter:,} bytes"
        return f"{each}, {options.most_bytes(adapters):,} bytes in all"
    if options.budget is not None:
        return f"«budget» {options.budget:,} bytes"
    return f"«max_mean_error» {options.max_mean_error}"

"""How much to keep of all adapters so that a bundle meets a budget or a mean error: planned, tried, and corrected."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..base.errors import UsageError
from ..base.progress import Progress
from ..bundle.manifest import Manifest
from ..bundle.tensor_file import DTYPES
from ..planning.options import CompressOptions
from ..planning.spectra import COARSEST, FINEST, Outlook, Spectra, planned_step
from ..reading.scan import Scan
from ..schemes.scheme import SteppedScheme

_AIM = 0.9985
"""Of what is allowed: a prediction that knows of an attempt nearby is right to about 0.1%."""
_NEAR = 0.98
"""Of what is allowed. Less is left unused only if nothing in between was found."""
_MOST = 4
"""Attempts, and one more if none of them met the bound. What they learn is nearly exact: more than two are rare."""


@dataclass(frozen=True)
class Attempt:
    """To keep as much as ``step`` says, a share of each adapter's √Σ‖ΔW‖²."""

    number: int
    step: float
    spectra: Spectra
    scheme: SteppedScheme
    itemsize: int
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
        return self.spectra.outlook(self.scheme, self.step, self.itemsize)

    @property
    def _easiest(self) -> float:
        """The step that meets the bound if any does."""
        return COARSEST if self.max_bytes is not None else FINEST

    def following(self, manifest: Manifest, size: int) -> Attempt | None:
        """What to try after an attempt that led to this bundle, of ``size`` bytes; None if it is good.

        Raises UsageError if nothing meets the bound.
        """
        errors = [adapter.squared_error for adapter in manifest.adapters]
        mean = sum(errors) / len(errors)
        used = size / self.max_bytes if self.max_bytes else mean / (self.max_mean or 1)
        if self.settled or _NEAR <= used <= 1:
            return None
        best, beyond = self.best, self.beyond
        if used > 1:
            beyond = self.step
        elif best is None or used > best[0]:
            best = used, self
        if used > 1 and self.step == self._easiest:
            raise self._unmet(manifest, size, mean)
        step = self._better(manifest, size, mean)
        if best and beyond and not min(best[1].step, beyond) < step < max(best[1].step, beyond):
            step = math.sqrt(best[1].step * beyond)
        onwards = step > self.step if (used > 1) == (self.max_bytes is not None) else step < self.step
        if self.number + 1 < _MOST and onwards:
            return replace(self, number=self.number + 1, step=step, best=best, beyond=beyond)
        if best is None:
            return replace(self, number=self.number + 1, step=self._easiest, beyond=beyond)
        return None if best[1] is self else replace(best[1], settled=True)

    def _better(self, manifest: Manifest, size: int, mean: float) -> float:
        """A step that meets the bound by what this attempt has shown of predictions."""
        if self.max_bytes is None:
            assert self.max_mean is not None
            aim = _AIM * self.max_mean * self.predicted_mean / mean if mean else self.max_mean
            return self.spectra.step_for_mean(self.scheme, aim, self.itemsize)
        tensors = _bytes_of_tensors(manifest, self.scheme.name)  # those of others are what they are
        if not tensors:
            return self._easiest
        left = max(_AIM * self.max_bytes - (size - tensors), 0.0)
        return self.spectra.step_for_bytes(self.scheme, left * self.predicted_bytes / tensors, self.itemsize)

    def _unmet(self, manifest: Manifest, size: int, mean: float) -> UsageError:
        besides = size - _bytes_of_tensors(manifest)
        if self.max_bytes is None:
            told = f"{self.scheme.name} gets no further than {mean:.4g}"
        elif besides >= self.max_bytes:
            told = f"names, configurations and what is no LoRA factor take {besides:,} bytes"
        else:
            told = f"{self.scheme.name} gets no further than {size:,} bytes"
        return UsageError(f"{self.asked}: {told}", "allow more")


def _bytes_of_tensors(manifest: Manifest, *schemes: str) -> int:
    """Of the files with the own tensors of adapters, of all or of those in ``schemes``."""
    own = {adapter.individual for adapter in manifest.adapters if not schemes or adapter.scheme in schemes}
    return sum(file.size_bytes for file in manifest.files if file.path in own)


def first_attempt(scanned: Scan, options: CompressOptions, device: torch.device, progress: Progress) -> Attempt:
    """What the singular values of all updates say."""
    scheme = options.scheme
    assert isinstance(scheme, SteppedScheme)
    spectra = Spectra.of(scanned, device, progress)
    step = planned_step(spectra, scheme, scanned, options)
    assert isinstance(step, float)
    count = len(scanned.collection.adapters)
    itemsize, most = DTYPES[options.dtype].itemsize, options.most_bytes(count)
    return Attempt(0, step, spectra, scheme, itemsize, most, options.max_mean_error, _asked(options, count))


def _asked(options: CompressOptions, adapters: int) -> str:
    if options.budget_per_adapter is not None:
        each = f"«budget_per_adapter» {options.budget_per_adapter:,} bytes"
        return f"{each}, {options.most_bytes(adapters):,} bytes in all"
    if options.budget is not None:
        return f"«budget» {options.budget:,} bytes"
    return f"«max_mean_error» {options.max_mean_error}"

"""How much to keep of all adapters so that a bundle meets a budget or a mean error: planned, tried, and corrected."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from ..base.errors import UsageError
from ..base.text import megabytes
from ..bundle.manifest import Manifest
from ..planning.options import CompressOptions
from ..planning.spectra import Outlook, Spectra
from ..reading.scan import Scan
from ..schemes.scheme import Counting, SteppedScheme

_AIM = 0.9985
"""Of what is allowed: a prediction that knows of an attempt nearby is right to about 0.1%."""
_NEAR = 0.98
"""Of what is allowed. Less is left unused only if nothing finer fits."""
_REST = {
    "disk": "names, configurations and what is no LoRA factor take",
    "resident": "what tells where codes are takes",
}
"""What bytes there are besides those of updates."""
_MOST = 4
"""Attempts. What they learn of sizes is exact after the first, so more than two are rare."""


class Taken(NamedTuple):
    """What an attempt has led to, in the bytes that are counted."""

    bytes: int
    of_updates: int
    """Those that the step decides."""


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

    def following(self, manifest: Manifest, taken: Taken) -> Attempt | None:
        """What to try after an attempt that led to this bundle; None if it is good.

        Raises UsageError if nothing meets the bound.
        """
        errors = [adapter.squared_error for adapter in manifest.adapters]
        mean = sum(errors) / len(errors)
        used = taken.bytes / self.max_bytes if self.max_bytes else mean / (self.max_mean or 1)
        last = self.number + 1 >= _MOST
        if used <= 1 and (used >= _NEAR or last):
            return None
        if last:
            bound = f"«max_mean_error» {self.max_mean}" if self.max_bytes is None else f"«budget» {self.max_bytes:,}"
            reached = f"{mean:.4g}" if self.max_bytes is None else f"{taken.bytes:,} bytes"
            raise UsageError(f"{bound}: {self.scheme.name} gets no further than {reached}", "allow more")
        step = self._better(taken, mean)
        if used <= 1 and step >= self.step:  # nothing finer fits, or there is nothing finer
            return None
        return replace(self, number=self.number + 1, step=step)

    def _better(self, taken: Taken, mean: float) -> float:
        """A step that meets the bound by what this attempt has shown of predictions."""
        if self.max_bytes is None:
            assert self.max_mean is not None
            aim = _AIM * self.max_mean * self.predicted_mean / mean if mean else self.max_mean
            return self.spectra.step_for_mean(self.scheme, aim, self.counting)
        least = taken.bytes - taken.of_updates
        left = _AIM * self.max_bytes - least
        if left <= 0:
            if taken.bytes <= self.max_bytes:
                return self.step
            rest = _REST[self.counting.objective]
            raise UsageError(f"«budget» {megabytes(self.max_bytes)}: {rest} {megabytes(least)}", "allow more")
        return self.spectra.step_for_bytes(self.scheme, left * self.predicted_bytes / taken.of_updates, self.counting)


def first_attempt(spectra: Spectra, scanned: Scan, step: float, options: CompressOptions) -> Attempt:
    """With the ``step`` that the singular values of all updates ask for."""
    scheme = options.scheme
    assert isinstance(scheme, SteppedScheme)
    most = options.most_bytes(len(scanned.collection.adapters))
    return Attempt(0, step, spectra, scheme, options.counting, most, options.max_mean_error)

"""How sure a ratio of two exact matches is: a paired bootstrap over rows, by numpy, the same every time."""

from __future__ import annotations

import numpy

from ..base.digests import sha256_bytes

SAMPLES = 4000
_LOW, _HIGH = 2.5, 97.5  # percentiles


def resampled(name: str, original: numpy.ndarray, compressed: numpy.ndarray) -> numpy.ndarray:
    """Exact match of both, [2, SAMPLES], of rows drawn with replacement, each time as many as there are.

    ``original`` and ``compressed`` are bool [n] of the same rows, which are drawn together. Rows of one kind (both
    right, one, the other, none) are alike, so how many there are of each is drawn: multinomial, which is the same.
    ``name`` is the seed, so that an adapter's interval does not depend on which others there are.
    """
    generator = numpy.random.default_rng(int(sha256_bytes(name.encode())[:16], 16))
    rows = len(original)
    kinds = numpy.array([(original & compressed).sum(), (original & ~compressed).sum(), (~original & compressed).sum()])
    drawn = generator.multinomial(rows, [*(kinds / rows), 1 - kinds.sum() / rows], SAMPLES)
    both, only_original, only_compressed = drawn[:, 0], drawn[:, 1], drawn[:, 2]
    return numpy.stack([both + only_original, both + only_compressed]) / rows


def interval(samples: numpy.ndarray) -> tuple[float, float] | None:
    """95% of the ratios compressed / original of ``samples`` [2, SAMPLES]; None where most of them have no ratio."""
    original, compressed = samples
    known = original > 0
    if known.sum() * 2 <= known.size:
        return None
    low, high = numpy.percentile(compressed[known] / original[known], [_LOW, _HIGH])
    return float(low), float(high)

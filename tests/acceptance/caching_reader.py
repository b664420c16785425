"""The numpy reader of the specification, for adapters by the dozen."""

from __future__ import annotations

import functools

import numpy as np
from testing.reference_reader import ReferenceReader


class CachingReader(ReferenceReader):
    """Reads and checks each file once."""

    @functools.cache  # noqa: B019 - lives as long as one test
    def tensors(self, path: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        return super().tensors(path)

"""Where an output may go: inputs are never changed, and neither are adapters and bundles."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..base.errors import UsageError
from .kinds import is_adapter, is_bundle


def check_output_path(output: Path, inputs: Iterable[Path] = (), called: str = "«output»") -> None:
    """Raise UsageError for an output in an adapter or a bundle, or that is, is in or has in it one of ``inputs``.

    An adapter or a bundle at ``output`` itself is no error here: `check_output` says whether it may be replaced.
    """
    real, hint = Path(os.path.realpath(output)), f"choose another {called}"
    for folder in real.parents:
        with suppress(PermissionError):  # what may not be read is none of ours
            if is_bundle(folder):
                raise UsageError(f"{output} is inside the bundle {folder}", hint)
        if is_adapter(folder):
            raise UsageError(f"{output} is in the folder of an adapter, {folder}", f"{hint}: inputs are never changed")
    for given in inputs:
        source = Path(os.path.realpath(given))
        if real == source:
            raise UsageError(f"{output} is the input itself", hint)
        if real.is_relative_to(source):
            raise UsageError(f"{output} is inside the input {given}", f"{hint}: inputs are never changed")
        if source.is_relative_to(real):
            raise UsageError(f"{output} has the input {given} in it", hint)

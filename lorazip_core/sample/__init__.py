"""Sixteen small adapters that come with lorazip, for `lorazip demo`, the tutorial and the tests."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def sample_path() -> Path:
    """The directory of the embedded adapters, ready to be given to `compress`.

    Raises FileNotFoundError when lorazip runs from a zip archive, where there are no directories.
    """
    folder = files(__name__).joinpath("adapters")
    if not isinstance(folder, Path):
        raise FileNotFoundError(f"{folder}: the sample is inside an archive; install lorazip unpacked")
    return folder

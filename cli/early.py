"""What is refused before PyTorch is loaded, which takes seconds: a mistake in a path is answered at once.

The core checks all of it again, and more, for whoever calls it.
"""

from __future__ import annotations

from pathlib import Path

from lorazip_core.errors import UsageError
from lorazip_core.files import check_output


def check_input(directory: Path) -> None:
    """Raise UsageError where no adapters can be."""
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory")


def check_new(output: Path, *, force: bool) -> None:
    """Raise OutputExists for an output that exists; with ``force`` the core decides whether it may be replaced."""
    if not force:
        check_output(output, force=False, replaceable=lambda folder: False)

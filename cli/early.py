"""What is refused at once, before PyTorch is loaded, which takes seconds."""

from __future__ import annotations

from pathlib import Path

from lorazip_core.base.atomic import check_output


def check_new(output: Path, *, force: bool) -> None:
    """Raise OutputExists for an output that exists; with ``force`` the core decides whether it may be replaced."""
    if not force:
        check_output(output, force=False, not_ours=lambda folder: None)

"""A report as a file, which appears complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from lorazip_core.errors import OutputExists, UsageError
from lorazip_core.files import canonical_json, write_file


def check_report_file(path: Path, *, bundle: Path, force: bool) -> None:
    """Refuse a place where the report may not go, before the work that it is about."""
    if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(bundle)):
        raise UsageError(f"{path} is inside the bundle", "choose another -o")
    if path.is_dir():
        raise UsageError(f"{path} is a directory", "-o names the file of the report")
    if os.path.lexists(path) and not force:
        raise OutputExists(f"{path} exists", "choose another -o, or --force to replace it")


def write_report(path: Path, report: msgspec.Struct) -> None:
    """The same bytes that --json prints."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_file(partial, canonical_json(msgspec.to_builtins(report)))
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise

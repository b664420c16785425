"""The YAML file of ``--config``, which vLLM takes options from: what each of its keys is on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ..base.errors import UsageError
from ..base.filesystem import naming

_ENDINGS = ("yaml", "yml")  # vLLM takes no other


class FileOption(NamedTuple):
    """A key of the file, and the words that stand for it and its value."""

    key: str
    words: list[str]


def read_options(path: Path) -> list[FileOption]:
    """All options in the file, in order. Raises UsageError for what vLLM could not read."""
    if str(path).rpartition(".")[2] not in _ENDINGS:
        raise UsageError(f"--config {path}: vLLM reads files that are called .yaml or .yml, and no other")
    if not path.is_file():
        raise UsageError(f"--config {path}: there is no such file")
    found = _mapping(path)
    if bad := [key for key in found if not isinstance(key, str)]:
        raise UsageError(f"{path}: {bad[0]!r} is no option of vLLM")
    return [FileOption(key, _words(path, key, value)) for key, value in found.items()]


def _mapping(path: Path) -> dict[Any, Any]:
    import yaml  # comes with vLLM

    try:
        with naming(path):
            found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise UsageError(f"{path}{where}: this is no YAML") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} has no options of vLLM, lines like 'max-model-len: 4096'")
    return found


def _words(path: Path, key: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [f"--{key}" if value else f"--no-{key}"]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)] if value else []
    if not isinstance(value, dict):
        return [f"--{key}", str(value)]
    try:
        return [f"--{key}", json.dumps(value)]
    except (TypeError, ValueError):
        raise UsageError(f"{path}: {key} has values that are not JSON's, as dates are not") from None

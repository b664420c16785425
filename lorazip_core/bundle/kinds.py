"""What is at a path that a command was given: a bundle, adapters, or something that another command takes.

Nothing here loads more than the standard library and msgspec, so that a mistake is answered at once.
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from ..adapter.formats.names import CONFIG_NAME
from ..adapter.lock import LOCK_NAME
from ..base.atomic import MARKER
from ..base.errors import UsageError

FORMAT: Literal["lorazip.bundle"] = "lorazip.bundle"
MANIFEST_NAME = "manifest.json"
EXPORT_NAME = "export.json"
"""The report that ``export`` leaves beside the adapters that it writes."""

_BUNDLE_FOLDERS = ("bases", "cores", "individual", "extras", "configs")
_VERBS = {"clusters": "cluster", "lock": "fetch", "plan": "compress"}  # of schemas that are not named for theirs
_LOOKED_INTO = 10_000  # folders, of those that may hold adapters: whether they do only changes the message


class Kind(Struct, frozen=True):
    """What is at a path, and what to do with it, in words."""

    what: str
    hint: str


class _Head(Struct):
    """The fields by which JSON files of lorazip are recognised."""

    schema: str | None = None
    format: str | None = None


def check_bundle_path(path: Path) -> None:
    """Raise UsageError for what is no bundle, not even a damaged one."""
    if is_bundle(path):
        return
    if not path.exists():
        raise UsageError(f"{path} is not a directory")
    found = _file(path) or _unfinished(path) or _inside_bundle(path) or _around_bundle(path) or _adapters(path)
    if found is None and any(_has_bundle_files(path / name) for name in _BUNDLE_FOLDERS):
        return
    if found is not None:
        raise UsageError(f"{path} is {found.what}, not a bundle", found.hint)
    what = (
        "its manifest.json is not that of a bundle" if (path / MANIFEST_NAME).exists() else f"it has no {MANIFEST_NAME}"
    )
    raise UsageError(f"{path} is not a bundle: {what}", "name a directory that 'lorazip compress' wrote")


def check_adapters_path(path: Path, *, may_be_empty: bool = False, typed: str | None = None) -> None:
    """Raise UsageError for what is no directory of adapters at first sight; adapters are not looked for.

    A file that is not lorazip's passes: the search for adapters names those of other tools. Messages have the path as
    it was ``typed``, if that differs.
    """
    shown = typed or str(path)
    if not path.exists():
        raise UsageError(f"{shown} is not a directory")
    if not path.is_dir() and _known_file(path) is None:
        return
    found = _known_file(path) or _unfinished(path) or _inside_bundle(path)
    if is_bundle(path):
        found = Kind("a bundle", f"'lorazip export {path} -o DIR' makes adapters of it")
    if found is not None:
        raise UsageError(f"{shown} is {found.what}, not a directory of adapters", found.hint)
    if not (may_be_empty or any(path.iterdir())):
        raise UsageError(f"{shown} is an empty directory: no adapters here", "'lorazip fetch' brings some")


def is_bundle(folder: Path) -> bool:
    """Whether a directory has the manifest of a bundle, sound or not."""
    return _head(folder / MANIFEST_NAME).format == FORMAT


def is_adapter(folder: Path) -> bool:
    """Whether a directory is the folder of an adapter."""
    return (folder / CONFIG_NAME).exists()


def schema_of(path: Path) -> str | None:
    """The schema that a JSON file of lorazip names; None for any other file."""
    return _head(path).schema


def wrote(schema: str) -> str:
    """Who wrote a file of ``schema``: lorazip.verify/1 comes from 'lorazip verify'."""
    verb = schema.removeprefix("lorazip.").partition("/")[0]
    return f"'lorazip {_VERBS.get(verb, verb)}'"


def _file(path: Path) -> Kind | None:
    return None if path.is_dir() else _known_file(path) or Kind("a file", "name a directory")


def _known_file(path: Path) -> Kind | None:
    """A file of a bundle, of an adapter, or that a command wrote."""
    if path.is_dir():
        return None
    folder = path.parent
    if path.name == MANIFEST_NAME and is_bundle(folder):
        return Kind("a file of a bundle", f"name the bundle, {folder}")
    if is_adapter(folder):
        return Kind("a file of an adapter", "name the directory that the adapter is in")
    schema = schema_of(path) if path.is_file() else None
    if schema is not None and schema.startswith("lorazip."):
        return Kind(f"a file of {wrote(schema)}", "name a directory")
    return None


def _unfinished(path: Path) -> Kind | None:
    if not (path / MARKER).exists():
        return None
    return Kind(
        "what an unfinished run has left", "the same command goes on from there, and removes it when it is done"
    )


def _has_bundle_files(folder: Path) -> bool:
    """Whether it may be a folder of a bundle whose manifest is lost."""
    return folder.is_dir() and any(entry.suffix in (".json", ".safetensors") for entry in folder.iterdir())


def _inside_bundle(path: Path) -> Kind | None:
    folder = Path(os.path.realpath(path)).parent
    return Kind("a folder of a bundle", f"name the bundle, {folder}") if is_bundle(folder) else None


def _around_bundle(path: Path) -> Kind | None:
    inner = next((each for each in sorted(path.iterdir()) if is_bundle(each)), None)
    if inner is None:
        return None
    return Kind("a directory with a bundle in it", f"name the bundle, {inner}")


def _adapters(path: Path) -> Kind | None:
    compress = f"'lorazip compress {path} -o BUNDLE' makes one of it"
    schema = schema_of(path / EXPORT_NAME)
    if schema is not None and schema.startswith("lorazip.export/"):
        return Kind("a directory of exported adapters", "name the bundle that they come from")
    if (path / LOCK_NAME).is_file():
        return Kind("a directory of fetched adapters", compress)
    if is_adapter(path):
        return Kind("an adapter", compress)
    for folder, names, _ in islice(os.walk(path), _LOOKED_INTO):
        names[:] = [name for name in names if not name.startswith(".")]
        if any(is_adapter(Path(folder, name)) for name in names):
            return Kind("a directory of adapters", compress)
    return None


def _head(path: Path) -> _Head:
    if path.suffix != ".json" or not path.is_file():  # weights would be read in vain, a pipe for ever
        return _Head()
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Head()

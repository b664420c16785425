"""Adapters of a bundle that people name."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.errors import UsageError
from .manifest import AdapterEntry, Manifest
from .near import NearNames, did_you_mean

if TYPE_CHECKING:  # it loads safetensors
    from .reader import Bundle


def choose(bundle: Bundle, wanted: Collection[str]) -> list[AdapterEntry]:
    """The adapters that `matching` finds; all if none is named."""
    chosen = set(matching(bundle.manifest, bundle.path, wanted))
    return [adapter for adapter in bundle.manifest.adapters if not wanted or adapter.name in chosen]


def matching(manifest: Manifest, bundle: Path, wanted: Collection[str]) -> list[str]:
    """The adapters that are called, or match a pattern of `fnmatch`, as ``wanted``; in the order of the manifest.

    Raises UsageError for what none is called or matches.
    """
    refuse_text(wanted)
    known = dict.fromkeys(adapter.name for adapter in manifest.adapters)
    chosen: set[str] = set()
    for name in wanted:
        found = [name] if name in known else [each for each in known if fnmatchcase(each, name)]
        if not found:
            raise unknown(name, known, str(bundle))
        chosen.update(found)
    return [name for name in known if name in chosen]


def refuse_text(names: Iterable[str | None]) -> None:
    """Raise UsageError for one name in place of several: its letters would be taken for names."""
    if isinstance(names, str):
        raise UsageError(f"{names!r} is one name, not a list of names", f"write [{names!r}]")


def unknown(name: str, known: Collection[str], where: str, lister: str = "'lorazip info'") -> UsageError:
    """That there is no adapter of this name among those ``known``, and which are named nearly so, or who lists them."""
    near = NearNames(known).find(name, 3, 0.5)
    hint = did_you_mean(near) if near else f"{lister} lists them"
    return UsageError(f"{where} has no adapter {name!r}", hint)

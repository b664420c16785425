"""Folder names for adapters: readable, portable, distinct, and the same again in every run."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..adapter.lock import Origin
from ..base.digests import safe_name, sha256_bytes
from .requested import RequestedAdapter

_PORTABLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+=-]*(?<!\.)")
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)

Identity = tuple[str, str, str]


def identity(origin: Origin) -> Identity:
    """What stays the same of an adapter while its commits move on: source, subfolder and the revision asked for."""
    source = origin.repository if origin.repository is not None else f"directory:{origin.directory}"
    return source, origin.subfolder, origin.revision or ""


def give_names(adapters: Iterable[RequestedAdapter], taken: Mapping[Identity, str]) -> list[RequestedAdapter]:
    """The adapters, each with its folder: ``owner/repo``, ``owner/repo--sub--folder``, ``directory/sub--folder``.

    There are always two levels, so that no adapter lies inside another. An adapter in ``taken`` keeps its folder.
    Names that differ in case or Unicode form alone would be one folder on some file systems; so each of them gets a
    digest of its identity at the end, whatever the order.
    """
    found = list(adapters)
    sharing: defaultdict[str, set[Identity]] = defaultdict(set)
    for who, name in taken.items():
        sharing[_folded(name)].add(who)
    for adapter in found:
        sharing[_folded(_readable(adapter.origin))].add(identity(adapter.origin))
    return [adapter.named(_name(adapter.origin, taken, sharing)) for adapter in found]


def _name(origin: Origin, taken: Mapping[Identity, str], sharing: Mapping[str, set[Identity]]) -> str:
    who = identity(origin)
    if who in taken:
        return taken[who]
    name = _readable(origin)
    return name if len(sharing[_folded(name)]) == 1 else f"{name}-{sha256_bytes(repr(who).encode())[:8]}"


def _readable(origin: Origin) -> str:
    if origin.repository is not None:
        owner, _, leaf = origin.repository.partition("/")
    else:
        owner, leaf = Path(os.path.normpath(origin.directory or ".")).name or "directory", ""
    leaf = "--".join(filter(None, (leaf, *origin.subfolder.split("/"))))
    if not leaf:
        owner, leaf = "local", owner
    return f"{_portable(owner)}/{_portable(leaf)}"


def _portable(part: str) -> str:
    """``part``, or a safe name with its digest where some file system would not take it as it is."""
    name = part if _PORTABLE.fullmatch(part) and len(part) <= 120 else safe_name(part)
    return f"adapter-{safe_name(part)}" if _DEVICE.fullmatch(name) else name


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()

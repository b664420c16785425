"""Where adapters come from: what a request for an adapter of a bundle carries as its ``lora_path``.

The digest of the manifest is part of it, so that vLLM's prefix cache takes no adapter for another of the same name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ..base.errors import LocalError
from ..bundle.contradictions import refuse_contradictions
from ..bundle.reader import Bundle

KEY = "lorazip"
"""In vLLM's ``additional_config``, and before every path."""
_DIGITS = 16


@dataclass(frozen=True)
class Source:
    """A bundle, and what its manifest is known by: wherever it lies, it is the same one."""

    bundle: Path = field(compare=False)
    digest: str

    def __str__(self) -> str:
        return f"{KEY}:{self.digest}:{self.bundle}"

    def open(self) -> Bundle:
        """Raises LocalError where another bundle lies there now, and as `Bundle`."""
        bundle = opened(self.bundle)
        if not bundle.digest.startswith(self.digest):
            raise LocalError(f"{self.bundle} is another bundle now than when adapters of it were asked for")
        return bundle


class Settings(NamedTuple):
    """What ``additional_config`` says."""

    source: Source
    spare: int
    """How many adapters may be added while the engine runs."""


def settings(additional_config: Any) -> Settings | None:
    """Those of an engine; None for one that serves no bundle.

    Raises LocalError for settings that make no sense, and as `Bundle`.
    """
    found = additional_config.get(KEY) if isinstance(additional_config, dict) else None
    if found is None:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("bundle"), str):
        raise LocalError(f'additional_config: "{KEY}" has to be like {{"bundle": "DIR"}}')
    if unknown := found.keys() - {"bundle", "manifest_sha256", "spare"}:
        raise LocalError(f'additional_config: "{KEY}" knows no {", ".join(sorted(unknown))}')
    path = Path(found["bundle"])
    digest = opened(path).digest
    if (wanted := found.get("manifest_sha256", digest)) != digest:
        raise LocalError(f"{path} has the manifest {digest}, not {wanted}")
    spare = found.get("spare", 0)
    if not isinstance(spare, int) or isinstance(spare, bool) or spare < 0:
        raise LocalError(f'additional_config: "spare" of "{KEY}" is {spare!r}, not a number of adapters')
    return Settings(Source(path.absolute(), digest[:_DIGITS]), spare)


def source_of(path: str, default: Source) -> Source:
    """Of a ``lora_path``: one that was made here, the folder of a bundle, or ``lorazip:`` for the ``default``.

    Only for a folder is the disk looked at. Raises LocalError for no path at all, and as `Bundle` for what is none.
    """
    if not path:
        raise LocalError("there is no path", "give that of the folder of a bundle")
    head, _, rest = path.partition(":")
    if head != KEY:
        return Source(Path(path).absolute(), opened(Path(path)).digest[:_DIGITS])
    digest, _, folder = rest.partition(":")
    if folder and not re.fullmatch(f"[0-9a-f]{{{_DIGITS}}}", digest):
        raise LocalError(f"{path}: {digest!r} is no digest of a bundle", "give the path of its folder")
    return Source(Path(folder), digest) if folder else default


def opened(path: Path) -> Bundle:
    """A bundle, opened once as long as its manifest is the same."""
    status = (path / "manifest.json").stat() if (path / "manifest.json").exists() else None
    return _opened(path, status and (status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=4)
def _opened(path: Path, _: object) -> Bundle:
    bundle = Bundle(path)
    refuse_contradictions(path, bundle.manifest)
    return bundle

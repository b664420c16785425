"""``fetch``: whole collections of adapters, from the Hub and from local directories, pinned by a lock."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .options import FetchOptions, Patience
from .report import FetchedAdapter, FetchFailure, FetchReport, FetchSummary

if TYPE_CHECKING:
    from .run import fetch

__all__ = ["FetchFailure", "FetchOptions", "FetchReport", "FetchSummary", "FetchedAdapter", "Patience", "fetch"]


def __getattr__(name: str) -> Any:
    """``fetch`` loads torch and the client of the Hub, which takes seconds: not before the options make sense."""
    if name != "fetch":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(".run", __name__).fetch

"""``fetch``: whole collections of adapters, from the Hub and from local directories, pinned by a lock."""

from .hub import Patience
from .options import FetchOptions
from .report import FetchedAdapter, FetchFailure, FetchReport, FetchSummary
from .run import fetch

__all__ = ["FetchFailure", "FetchOptions", "FetchReport", "FetchSummary", "FetchedAdapter", "Patience", "fetch"]

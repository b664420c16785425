"""Compress a collection of adapters on disk into a bundle."""

from ..planning.plan import CompressOptions
from .run import CompressReport, PlanReport, compress, plan

__all__ = ["CompressOptions", "CompressReport", "PlanReport", "compress", "plan"]

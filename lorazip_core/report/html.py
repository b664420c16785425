"""HTML pages of a result. They need the extra ``report``, plotly and jinja2, which is imported when a page is made."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..base.errors import LocalError

if TYPE_CHECKING:
    import numpy

    from ..clustering.clusters_file import Assignment
    from ..compress.run import Compression
    from ..planning.options import CompressOptions
    from ..planning.plan import PlanReport
    from ..verify.run import Verification

_NEEDED = ("jinja2", "plotly")


def check_available() -> None:
    """Raise LocalError where pages cannot be made; called before the work that a page is to show."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise LocalError(f"an HTML report needs {' and '.join(missing)}", f"pip install {' '.join(missing)}")


def verify_page(verification: Verification) -> str:
    """A result of ``verify`` as one HTML page that loads nothing. The same result gives the same text."""
    check_available()
    from .verification import page

    return page(*verification)


def cluster_page(assignment: Assignment, similarity: numpy.ndarray) -> str:
    """A clustering as one HTML page that loads nothing. The same clustering gives the same text.

    ``similarity``, [n, n], is the share of adapter i that the subspaces of adapter j hold, in the order of
    ``assignment.adapters``. Raises ValueError for another shape.
    """
    check_available()
    from .clustering import page

    return page(assignment, similarity)


def compress_page(compression: Compression, options: CompressOptions) -> str:
    """A result of ``compress`` with these ``options`` as one HTML page that loads nothing.

    The same result gives the same text.
    """
    check_available()
    from .compression import page

    return page(compression, options)


def plan_page(plan: PlanReport, options: CompressOptions) -> str:
    """What ``compress`` would do with these ``options`` as one HTML page that loads nothing.

    The same plan gives the same text.
    """
    check_available()
    from .compression import plan_page

    return plan_page(plan, options)

"""The options of a run of ``fetch``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..adapter.lock import LOCK_NAME, Filters, Lock
from ..base.errors import UsageError


@dataclass(frozen=True)
class RetryPolicy:
    """How often a request that fails is repeated, and for how long."""

    attempts: int = 6
    first_wait: float = 1.0
    """Seconds before the second attempt; they double with each, up to 30, and some jitter is added."""
    seconds: float = 60.0
    """So long after the first attempt no new one is made, unless the Hub had asked to wait (429)."""


@dataclass(frozen=True)
class FetchOptions:
    """What to fetch of what the sources name and how, and how requests are repeated."""

    base_model: str | None = None
    search: str | None = None
    tags: tuple[str, ...] = ()
    limit: int | None = None
    max_bytes: int | None = None
    allow_pickle: bool = False
    locked: bool = False
    update: bool = False
    prune: bool = False
    force: bool = False
    fail_fast: bool = False
    skip_bad: bool = False
    dry_run: bool = False
    jobs: int = 16
    retries: RetryPolicy = field(default_factory=RetryPolicy)

    @property
    def filters(self) -> Filters:
        """What narrows the sources down."""
        return Filters(base_model=self.base_model, search=self.search, tags=tuple(sorted(self.tags)), limit=self.limit)

    def check(self, sources: Sequence[str], lock: Lock | None, directory: Path) -> None:
        """Raise UsageError for options that contradict each other."""
        if self.locked and (self.update or self.prune or self.skip_bad):
            raise UsageError("«locked» has just what the lock says, so no «update», «prune» or «skip_bad» goes with it")
        if self.prune and not sources:
            raise UsageError("«prune» removes what the given sources do not name, and none is given")
        if lock is None and (self.locked or not sources):
            hint = "name a SOURCE, or choose another «output»" if not self.locked else "fetch once without «locked»"
            raise UsageError(f"{directory} has no {LOCK_NAME}", hint)

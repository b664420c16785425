"""Which adapters a run is to fetch: taken from the lock if it has them, else found on the Hub or in directories."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from msgspec.structs import replace

from ..adapter.lock import LOCK_NAME, Filters, LeftOut, Lock, LockedAdapter, LockedSource
from ..base.errors import CheckFailed, LorazipError
from ..base.progress import Progress
from ..base.stopping import check_stop
from ..base.text import unmarked
from .hub import Hub, license_in
from .hub_errors import HubUnavailable, Outage
from .listing import Candidate, Failure, Found, Limits, Lookup, adapter_of, candidates, local_adapters, lookups
from .names import Identity, give_names, identity
from .requested import RequestedAdapter, requested_by_lock
from .sources import DirectorySource, Source

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Plan:
    """The adapters to fetch, by source, and what cannot be fetched."""

    sources: list[LockedSource] = field(default_factory=list)
    """As the new lock will have them, including those that this run was not asked for."""
    requested: list[RequestedAdapter] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def leave_out(self, dropped: Mapping[str, LeftOut], before: Container[str]) -> None:
        """Leave out adapters that turned out bad; those that the old lock has (``before``) stay in their source."""
        self.left_out += [dropped[name] for name in sorted(dropped)]
        for number, source in enumerate(self.sources):
            if hit := sorted(dropped.keys() & set(source.adapters)):
                self.sources[number] = replace(
                    source,
                    adapters=[name for name in source.adapters if name not in dropped or name in before],
                    left_out=_sorted([*source.left_out, *(dropped[name] for name in hit)]),
                )


class Planner:
    """Makes the plan. ``journal`` has what an unfinished run fetched, whose commits and folders are kept."""

    def __init__(
        self,
        directory: Path,
        lock: Lock | None,
        journal: Mapping[str, LockedAdapter],
        hub: Hub,
        limits: Limits,
        executor: Executor,
        jobs: int,
        progress: Progress,
    ) -> None:
        self._directory = directory
        self._lock = lock or Lock(sources=[], adapters=[])
        self._entries = {entry.name: entry for entry in self._lock.adapters}
        self._journal = journal
        self._hub = hub
        self._limits = limits
        self._executor = executor
        self._jobs = jobs
        self._progress = progress

    def from_lock(self, sources: Sequence[Source] | None) -> Plan:
        """What the lock has, of ``sources`` or all, without requests. Raises CheckFailed for sources that it lacks."""
        known = self._known()
        names = set(self._entries if sources is None else ())
        for source in sources or ():
            if (source.text, source.filters) not in known:
                raise CheckFailed(
                    f"{self._directory / LOCK_NAME} was made without {source.text!r}, or with other filters",
                    "fetch without «locked» to add it",
                )
            names.update(known[source.text, source.filters].adapters)
        left_out = [each for source in self._lock.sources for each in source.left_out]
        return Plan(list(self._lock.sources), [self._again(name) for name in sorted(names)], _sorted(left_out))

    def resolve(self, sources: Sequence[Source], *, update: bool, prune: bool, skip_bad: bool) -> Plan:
        """The adapters of ``sources``: as the lock has them, or with ``update`` or where it lacks them, looked up.

        The lock lacks what an option had left out that is not given this time.
        """
        options = (
            {"listing"} | ({"skip-bad"} if skip_bad else set()) | ({"max-size"} if self._limits.max_bytes else set())
        )
        known = {} if update else self._known()
        locked_sources = {
            source: locked
            for source in sources
            if (locked := known.get((source.text, source.filters))) is not None
            and options.issuperset(each.because for each in locked.left_out)
        }
        plan = Plan()
        found = self._look_up([source for source in sources if source not in locked_sources], update)
        names = self._name(found, plan, skip_bad)
        for source in sources:
            if source in locked_sources:
                plan.sources.append(locked_sources[source])
                plan.left_out += locked_sources[source].left_out
                plan.requested += [self._again(name) for name in locked_sources[source].adapters]
                continue
            given = [names[self._key(each)] for each in found[source] if isinstance(each, RequestedAdapter)]
            out = _sorted(each for each in found[source] if isinstance(each, LeftOut))
            plan.sources.append(
                LockedSource(
                    source=source.text,
                    filters=source.filters,
                    adapters=sorted({requested.name for requested in given} | self._kept(source, out)),
                    left_out=out,
                )
            )
            plan.left_out += out
            plan.requested += given
        plan.left_out = _sorted(plan.left_out)
        plan.requested = list({requested.name: requested for requested in plan.requested}.values())
        plan.sources = self._in_order(plan.sources, prune)
        return plan

    def _in_order(self, asked: list[LockedSource], prune: bool) -> list[LockedSource]:
        """The sources of the new lock, in the order in which they were first given; with ``prune`` only those asked."""
        new = {source.source: source for source in asked}
        before = {source.source: source for source in self._lock.sources if not prune or source.source in new}
        return list((before | new).values())

    def _kept(self, source: Source, out: list[LeftOut]) -> set[str]:
        """Adapters of a source in the lock that could not be looked up this time: ``skip_bad`` keeps them."""
        skipped = {each.what for each in out if each.because == "skip-bad"}
        before = [known for known in self._lock.sources if known.source == source.text]
        names = {name for known in before for name in known.adapters}
        return {
            name
            for name in names
            if skipped & {source.text, self._entries[name].origin.repository, self._again(name).label}
        }

    def _again(self, name: str) -> RequestedAdapter:
        return requested_by_lock(self._entries[name], self._directory)

    def _known(self) -> dict[tuple[str, Filters | None], LockedSource]:
        return {(source.source, source.filters): source for source in self._lock.sources}

    def _look_up(self, sources: Sequence[Source], update: bool) -> dict[Source, list[Found]]:
        found: dict[Source, list[Found]] = {source: [] for source in sources}
        remote: list[Source] = [source for source in sources if not isinstance(source, DirectorySource)]
        lookups_of: dict[Source, list[Lookup]] = {}
        for asked, listed in zip(remote, self._executor.map(self._lookups, remote), strict=True):
            lookups_of[asked] = [lookup for lookup in listed if isinstance(lookup, Lookup)]
            found[asked] += [each for each in listed if not isinstance(each, Lookup)]
        answers = self._answers(self._distinct(lookups_of.values()), {} if update else self._pins())
        for asked, own in lookups_of.items():
            found[asked] += [each for lookup in own for each in answers[lookup]]
        for source in sources:
            if isinstance(source, DirectorySource):
                found[source] += local_adapters(source, self._directory, self._limits, license_in)
        return found

    def _answers(self, asked: list[Lookup], pins: Mapping[tuple[str, str | None], str]) -> Mapping[Lookup, list[Found]]:
        """The adapters in each repository. Repositories are listed first, then the configurations in them are read."""
        answers: dict[Lookup, list[Found]] = {lookup: [] for lookup in asked}
        outage = Outage(self._jobs)
        listed: list[Candidate] = []

        def look(lookup: Lookup) -> list[Candidate | LeftOut | Failure]:
            return candidates(lookup, pins.get((lookup.repository, lookup.revision)), self._hub)

        def read(candidate: Candidate) -> list[Found]:
            return adapter_of(candidate, self._hub, self._limits)

        for lookup, there in self._map("looking at repositories", look, asked, outage):
            listed += [each for each in there if isinstance(each, Candidate)]
            answers[lookup] += [each for each in there if not isinstance(each, Candidate)]
        for candidate, found in self._map("reading configurations", read, listed, outage):
            answers[candidate.lookup] += found
        return answers

    def _map(
        self, label: str, function: Callable[[T], list[R]], items: list[T], outage: Outage
    ) -> Iterator[tuple[T, list[R]]]:
        """Each item with its result, in order, as a stage of progress."""
        with self._progress.stage(label, len(items)) as advance:
            for item, found in zip(items, self._executor.map(function, items), strict=True):
                check_stop()
                outage.record(next((each.error for each in found if isinstance(each, Failure)), None))
                yield item, found
                advance(1)

    def _lookups(self, source: Source) -> list[Lookup | LeftOut | Failure]:
        try:
            return list(lookups(source, self._hub))
        except HubUnavailable:
            raise
        except LorazipError as error:
            return [Failure(source.text, error)]

    @staticmethod
    def _distinct(lists: Iterable[list[Lookup]]) -> list[Lookup]:
        """Each once; one that is named as well as in a collection counts as named."""
        found: dict[Lookup, Lookup] = {}
        for lookup in (lookup for own in lists for lookup in own):
            if lookup not in found or lookup.named:
                found[lookup] = lookup
        return list(found.values())

    def _pins(self) -> dict[tuple[str, str | None], str]:
        """The commits that repositories have been fetched at, by the lock and by an unfinished run."""
        entries = [*self._lock.adapters, *self._journal.values()]
        return {
            (entry.origin.repository, entry.origin.revision): entry.origin.commit
            for entry in entries
            if entry.origin.repository is not None and entry.origin.commit is not None
        }

    def _name(
        self, found: dict[Source, list[Found]], plan: Plan, skip_bad: bool
    ) -> dict[tuple[str, ...], RequestedAdapter]:
        """Sort out failures, and give every adapter that was found its folder. One commit by two names is one."""
        adapters: dict[tuple[str, ...], RequestedAdapter] = {}
        failed: dict[str, Failure] = {}
        for own in found.values():
            for number, each in enumerate(own):
                if isinstance(each, Failure) and skip_bad and each.can_be_skipped:
                    own[number] = each.left_out("skip-bad")
                elif isinstance(each, Failure):
                    failed.setdefault(str(each.error), each)
                elif isinstance(each, RequestedAdapter):
                    adapters.setdefault(self._key(each), each)
        plan.failures += failed.values()
        taken: dict[Identity, str] = {
            identity(entry.origin): entry.name for entry in [*self._journal.values(), *self._lock.adapters]
        }
        return {self._key(requested): requested for requested in give_names(adapters.values(), taken)}

    @staticmethod
    def _key(requested: RequestedAdapter) -> tuple[str, ...]:
        origin = requested.origin
        return origin.repository or "", origin.commit or "", origin.directory or "", origin.subfolder


def stored(source: LockedSource) -> LockedSource:
    """A source as the lock has it: without the marks that the reasons of this run have around parameters."""
    return replace(source, left_out=_sorted(replace(each, reason=unmarked(each.reason)) for each in source.left_out))


def _sorted(left_out: Iterable[LeftOut]) -> list[LeftOut]:
    """Each once, in an order that does not depend on who answered first."""
    return sorted(set(left_out), key=lambda each: (each.what, each.reason))

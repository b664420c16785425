"""What a run is to bring: asked of the lock where that knows, of the Hub and of local directories where it does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace

from ..errors import CheckFailed, LorazipError, UsageError
from ..lock import LOCK_NAME, Filters, LeftOut, Lock, LockedAdapter, LockedSource
from ..progress import Progress
from .hub import Hub, license_in
from .listing import Failure, Found, Limits, Place, adapters_at, local_adapters, places
from .names import Identity, give_names, identity
from .sources import DirectorySource, Source
from .trouble import HubUnavailable, Outage
from .wanted import Wanted, wanted_again


@dataclass
class Plan:
    """The adapters to have, by source, and what cannot be had."""

    sources: list[LockedSource] = field(default_factory=list)
    """As the new lock will have them, those that were not asked for included."""
    wanted: list[Wanted] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def leave_out(self, wanted: Wanted, left_out: LeftOut) -> None:
        """Take back an adapter that turned out to be of no use."""
        self.left_out.append(left_out)
        for number, source in enumerate(self.sources):
            if wanted.name in source.adapters:
                adapters = [name for name in source.adapters if name != wanted.name]
                self.sources[number] = replace(source, adapters=adapters, left_out=[*source.left_out, left_out])


class Planner:
    """Makes the plan. ``journal`` has what an unfinished run brought: its commits and folders hold on."""

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
        """Just what the lock says, of ``sources`` or of all; asks nobody. Raises CheckFailed for others than it has."""
        known = self._known()
        names = set(self._entries if sources is None else ())
        for source in sources or ():
            if (source.text, source.filters) not in known:
                raise CheckFailed(
                    f"{self._directory / LOCK_NAME} was made without {source.text!r}, or with other filters",
                    "fetch without --locked to add it",
                )
            names.update(known[source.text, source.filters].adapters)
        return Plan(list(self._lock.sources), [self._again(name) for name in sorted(names)])

    def resolve(self, sources: Sequence[Source], *, update: bool, prune: bool, skip_bad: bool) -> Plan:
        """The adapters of ``sources``: as the lock has them, or with ``update`` or where it lacks them, looked up."""
        known = {} if update else self._known()
        settled = {
            source: known[source.text, source.filters] for source in sources if (source.text, source.filters) in known
        }
        plan = Plan()
        found = self._look_up([source for source in sources if source not in settled], update)
        names = self._name(found, plan, skip_bad)
        for source in sources:
            if source in settled:
                plan.sources.append(settled[source])
                plan.wanted += [self._again(name) for name in settled[source].adapters]
                continue
            given = [names[self._key(each)] for each in found[source] if isinstance(each, Wanted)]
            out = [each for each in found[source] if isinstance(each, LeftOut)]
            plan.sources.append(
                LockedSource(
                    source=source.text,
                    filters=source.filters,
                    adapters=sorted({wanted.name for wanted in given}),
                    left_out=sorted(set(out), key=lambda each: each.what),
                )
            )
            plan.wanted += given
        plan.wanted = list({wanted.name: wanted for wanted in plan.wanted}.values())
        plan.sources = self._in_order(plan.sources, prune)
        return plan

    def _in_order(self, asked: list[LockedSource], prune: bool) -> list[LockedSource]:
        """The sources of the new lock, in the order in which they were first given; with ``prune`` only those asked."""
        new = {source.source: source for source in asked}
        before = {source.source: source for source in self._lock.sources if not prune or source.source in new}
        return list((before | new).values())

    def _again(self, name: str) -> Wanted:
        if name not in self._entries:
            raise UsageError(f"{self._directory / LOCK_NAME}: a source has {name!r}, which is none of its adapters")
        return wanted_again(self._entries[name], self._directory)

    def _known(self) -> dict[tuple[str, Filters | None], LockedSource]:
        return {(source.source, source.filters): source for source in self._lock.sources}

    def _look_up(self, sources: Sequence[Source], update: bool) -> dict[Source, list[Found]]:
        found: dict[Source, list[Found]] = {source: [] for source in sources}
        remote: list[Source] = [source for source in sources if not isinstance(source, DirectorySource)]
        wanted_places: dict[Source, list[Place]] = {}
        for asked, listed in zip(remote, self._executor.map(self._places, remote), strict=True):
            wanted_places[asked] = [place for place in listed if isinstance(place, Place)]
            found[asked] += [each for each in listed if not isinstance(each, Place)]
        pins = {} if update else self._pins()
        distinct = self._distinct(wanted_places.values())
        outage = Outage(self._jobs)
        with self._progress.stage("looking at repositories", len(distinct)) as advance:

            def look(place: Place) -> list[Found]:
                pinned = pins.get((place.repository, place.revision))
                return adapters_at(place, pinned, self._hub, self._limits)

            answers: dict[Place, list[Found]] = {}
            for place, answer in zip(distinct, self._executor.map(look, distinct), strict=True):
                answers[place] = answer
                outage.heed(next((each.error for each in answer if isinstance(each, Failure)), None))
                advance(1)
        for asked, own in wanted_places.items():
            found[asked] += [each for place in own for each in answers[place]]
        for source in sources:
            if isinstance(source, DirectorySource):
                found[source] += local_adapters(source, self._limits, license_in)
        return found

    def _places(self, source: Source) -> list[Place | LeftOut | Failure]:
        try:
            return list(places(source, self._hub))
        except HubUnavailable:
            raise
        except LorazipError as error:
            return [Failure(source.text, error)]

    @staticmethod
    def _distinct(lists: Iterable[list[Place]]) -> list[Place]:
        """Each place once; who is asked for by name and is in a collection too, is asked for by name."""
        found: dict[Place, Place] = {}
        for place in (place for own in lists for place in own):
            if place not in found or place.named:
                found[place] = place
        return list(found.values())

    def _pins(self) -> dict[tuple[str, str | None], str]:
        """The commits that repositories have been fetched at, by the lock and by an unfinished run."""
        entries = [*self._lock.adapters, *self._journal.values()]
        return {
            (entry.origin.repository, entry.origin.revision): entry.origin.commit
            for entry in entries
            if entry.origin.repository is not None and entry.origin.commit is not None
        }

    def _name(self, found: dict[Source, list[Found]], plan: Plan, skip_bad: bool) -> dict[tuple[str, ...], Wanted]:
        """Sort out failures, and give every adapter that was found its folder. One commit by two names is one."""
        adapters: dict[tuple[str, ...], Wanted] = {}
        failed: dict[str, Failure] = {}
        for own in found.values():
            for number, each in enumerate(own):
                if isinstance(each, Failure) and skip_bad and each.can_be_skipped:
                    own[number] = each.left_out
                elif isinstance(each, Failure):
                    failed.setdefault(str(each.error), each)
                elif isinstance(each, Wanted):
                    adapters.setdefault(self._key(each), each)
            plan.left_out += [each for each in own if isinstance(each, LeftOut)]
        plan.left_out = list(dict.fromkeys(plan.left_out))
        plan.failures += failed.values()
        taken: dict[Identity, str] = {
            identity(entry.origin): entry.name for entry in [*self._journal.values(), *self._lock.adapters]
        }
        return {self._key(wanted): wanted for wanted in give_names(adapters.values(), taken)}

    @staticmethod
    def _key(wanted: Wanted) -> tuple[str, ...]:
        origin = wanted.origin
        return origin.repository or "", origin.commit or "", origin.directory or "", origin.subfolder

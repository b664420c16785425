"""``fetch``: adapters from the Hub and from local directories into one directory, pinned by its lock."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import CancelledError, Executor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import constants

from ..adapter.discovery import find_adapters
from ..adapter.lock import LOCK_NAME, LeftOut, Lock, LockedAdapter, read_strictly
from ..base.errors import CheckFailed, LocalError, LorazipError, OutputExists, UsageError
from ..base.progress import Progress, Silent, Transfer
from ..base.stopping import check_stop
from ..base.text import count
from ..bundle.kinds import is_adapter, is_bundle
from ..bundle.output_path import check_output_path
from .download import NotAsLocked, check_space, fetch_adapter
from .http_client import HttpClient, Stopped
from .hub import Hub
from .hub_errors import HubCorrupt, HubDiffers, HubUnavailable, Outage
from .listing import Failure, Limits
from .options import FetchOptions
from .plan import Plan, Planner, stored
from .report import FetchedAdapter, FetchFailure, FetchReport, FetchSummary
from .requested import RequestedAdapter, folder_digests
from .sources import is_within, read_sources, sources_of
from .state import State, entry_of, identified, state_of
from .workspace import Workspace, adapter_folder, read_journal

_SILENT = Silent()


def fetch(sources: Sequence[str], output: Path, options: FetchOptions, *, progress: Progress = _SILENT) -> FetchReport:
    """Fetch the adapters that ``sources`` name into ``output``, and write its lock when all of them are there.

    Failures of single adapters are in the report's ``failures``; what has arrived stays, and the next run goes on from
    there. Raises UsageError, also for an ``output`` in a bundle or an adapter, CheckFailed for sources that the lock
    lacks under ``locked``, HubError when the Hub cannot be reached at all, LocalError for a full disk or another run at
    work, and with ``fail_fast`` the first failure.
    """
    started = time.monotonic()
    if os.path.lexists(output) and not output.is_dir():
        what = "a file, not a directory" if output.exists() else "a link to nothing"
        raise UsageError(f"{output} is {what}", "choose another «output»")
    check_output_path(output)
    if is_bundle(output) or is_adapter(output):
        what = "a bundle" if is_bundle(output) else "the folder of an adapter"
        raise UsageError(f"{output} is {what}, and adapters would go into it", "choose another «output»")
    if is_within(Path(constants.HF_HUB_CACHE), output):
        raise UsageError(f"the cache of the Hub is inside {output}", "choose another «output», or another HF_HOME")
    with HttpClient(progress.note) as client:
        run = _Run(output, options, Hub(client, options.retries), progress)
        if options.dry_run or options.locked:
            with client.executor(options.jobs) as executor:
                run.look(sources, executor)
        if not (options.dry_run or (options.locked and run.has_all)):
            with (
                # What a killed run has left to finish belongs to another lock than that of ``locked``.
                Workspace(output, recover=not options.locked) as workspace,
                client.executor(options.jobs) as executor,
            ):
                if not options.locked:
                    run.look(sources, executor)
                run.fetch_missing(workspace, executor)
        return run.report(time.monotonic() - started)


@dataclass
class _Run:
    """One run, step by step: plan, compare with what is there, fetch what is missing, report."""

    directory: Path
    options: FetchOptions
    hub: Hub
    progress: Progress
    lock: Lock | None = None
    before: dict[str, LockedAdapter] = field(default_factory=dict)
    """The entries of the lock, by name."""
    journal: dict[str, LockedAdapter] = field(default_factory=dict)
    """Those of an unfinished run."""
    plan: Plan = field(default_factory=Plan)
    states: dict[str, State] = field(default_factory=dict)
    entries: dict[str, LockedAdapter] = field(default_factory=dict)
    """What is there, or held until all is, by name."""
    removed: list[str] = field(default_factory=list)
    complete: bool = False

    def look(self, words: Sequence[str], executor: Executor) -> None:
        """Find out which adapters at which commits are asked for, and which of them are there already."""
        self.lock = read_strictly(self.directory)
        self.before = {entry.name: entry for entry in self.lock.adapters} if self.lock else {}
        self.journal = read_journal(self.directory)
        self._make_plan(words, executor)
        self._compare(executor)
        self._find_others()
        self.complete = self.options.locked and self.has_all and not self.plan.failures

    @property
    def has_all(self) -> bool:
        """Whether every adapter is there."""
        return len(self.entries) == len(self.plan.requested)

    def _make_plan(self, words: Sequence[str], executor: Executor) -> None:
        """Take from the lock what it has, and ask the Hub for the rest."""
        options, lock = self.options, self.lock
        options.check(words, lock, self.directory)
        sources = read_sources(words, self.directory, options.filters)
        limits = Limits(options.max_bytes, options.allow_pickle)
        planner = Planner(self.directory, lock, self.journal, self.hub, limits, executor, options.jobs, self.progress)
        if options.locked or not (sources or options.update):
            self.plan = planner.from_lock(sources or None)
        else:
            sources = sources or (sources_of(lock, self.directory) if lock else [])
            self.plan = planner.resolve(sources, update=options.update, prune=options.prune, skip_bad=options.skip_bad)
        if options.prune:
            named = {name for source in self.plan.sources for name in source.adapters}
            self.removed = sorted(self.before.keys() - named)
        self._check_fail_fast()

    def _compare(self, executor: Executor) -> None:
        """Every file is read: its size and time of change do not prove that it is the same."""
        there = sum(os.path.lexists(self.directory / requested.name) for requested in self.plan.requested)
        with self.progress.stage("checking what is there", there) as advance:
            for requested, state in zip(
                self.plan.requested, executor.map(self._state, self.plan.requested), strict=True
            ):
                check_stop()
                if isinstance(state, LorazipError):
                    self.plan.failures.append(Failure(requested.label, state))
                elif not self._would_lose(requested.label, requested.name, state.lost):
                    self.states[requested.name] = state
                    if state.entry is not None:
                        self.entries[requested.name] = state.entry
                    advance(state.is_there)
        for name in self.removed:
            ours = {file.path: file.sha256 for file in self.before[name].files}
            digests = folder_digests(adapter_folder(self.directory, name))
            self._would_lose(name, name, next((path for path in digests if ours.get(path) != digests[path]), None))
        self._check_fail_fast()

    def _state(self, requested: RequestedAdapter) -> State | LorazipError:
        known = [entries[requested.name] for entries in (self.before, self.journal) if requested.name in entries]
        try:
            return state_of(requested, adapter_folder(self.directory, requested.name), known)
        except LorazipError as error:
            return error

    def fetch_missing(self, workspace: Workspace, executor: Executor) -> None:
        """Download and copy what is missing, and write the lock if nothing has failed."""
        todo = []
        for requested in self.plan.requested:
            if requested.name in self.states and requested.name not in self.entries:
                held = entry_of(requested, identified(requested, workspace.held(requested.name)))
                if held is None:
                    todo.append(requested)
                else:  # an unfinished run has fetched it
                    self.entries[requested.name] = held
        check_space(todo, self.directory, self.hub)
        if todo:
            size = sum(requested.size_bytes for requested in todo)
            with self.progress.transfer("fetching", len(todo), size) as transfer:
                self._fetch_all(todo, workspace, executor, transfer)
        if not self.plan.failures:
            self._finish(workspace)
        elif waiting := sum(map(self._waits, self.plan.requested)):
            self.progress.note(f"{count(waiting, 'adapter')} arrived and will replace what is there when all have")

    def _fetch_all(
        self, todo: list[RequestedAdapter], workspace: Workspace, executor: Executor, transfer: Transfer
    ) -> None:
        dropped: dict[str, LeftOut] = {}
        waiting = {
            executor.submit(
                fetch_adapter, requested, self.hub, workspace, transfer, self.options.allow_pickle
            ): requested
            for requested in todo
        }
        outage, stopping = Outage(self.options.jobs), False
        for future in as_completed(waiting):
            requested = waiting[future]
            try:
                self.entries[requested.name] = future.result()
                transfer.finished()
                outage.record(None)
            except (CancelledError, Stopped):
                continue
            except LorazipError as error:
                if stopping:  # it failed because of that
                    continue
                failure = self._failure_of(requested, error, outage)
                if self.options.skip_bad and failure.can_be_skipped:
                    dropped[requested.name] = failure.left_out("skip-bad")
                    continue
                self.plan.failures.append(failure)
                if self.options.fail_fast or isinstance(failure.error, HubUnavailable | LocalError):
                    stopping = True
                    for other in waiting:
                        other.cancel()
                    self.hub.stop()
        self.plan.leave_out(dropped, self.before)
        if stopping:
            missing = sum(requested.name not in self.entries for requested in todo)
            self.progress.note(f"stopped; {count(missing, 'adapter')} of {len(todo)} did not arrive")

    def _failure_of(self, requested: RequestedAdapter, error: LorazipError, outage: Outage) -> Failure:
        """The failure to report for an exception: an outage, if it is one more of many."""
        if self.options.locked and isinstance(error, HubCorrupt | HubDiffers | NotAsLocked):
            error = CheckFailed(error.message, error.hint)
        try:
            outage.record(error)
        except HubUnavailable as unavailable:
            error = unavailable
        return Failure(requested.label, error)

    def _waits(self, requested: RequestedAdapter) -> bool:
        """Whether it has arrived, and is held until all have."""
        state = self.states.get(requested.name)
        return state is not None and state.is_there and state.status != "present" and requested.name in self.entries

    def _would_lose(self, label: str, name: str, lost: str | None) -> bool:
        if lost is None or self.options.force:
            return False
        where = f"{self.directory / name}: {'this' if lost == '.' else lost} is not as lorazip wrote it"
        error = OutputExists(where, "move it away, or «force» to replace it")
        self.plan.failures.append(Failure(label, error))
        return True

    def _check_fail_fast(self) -> None:
        if self.options.fail_fast and self.plan.failures:
            raise self.plan.failures[0].error

    def _find_others(self) -> None:
        """Report adapters in the directory that were not asked for: compress would take them as well."""
        known = set(self.before)
        if not self.options.locked:
            known |= self.journal.keys() | {requested.name for requested in self.plan.requested}
        there = find_adapters(self.directory).adapters if self.directory.exists() else ()
        others = [folder.name for folder in there if folder.name not in known]
        if self.options.locked:
            for name in others:
                where = f"{self.directory / name}: {LOCK_NAME} has no such adapter"
                hint = "an unfinished fetch brought it: run that again, or move it away"
                error = CheckFailed(where, hint if name in self.journal else "move it away")
                self.plan.failures.append(Failure(name, error))
        elif others:
            names = f"{others[0]!r}{f' and {len(others) - 1} more' if others[1:] else ''}"
            self.progress.note(f"{self.directory} has adapters that were not fetched, such as {names}")

    def _finish(self, workspace: Workspace) -> None:
        adapters = self.before | self.entries
        for name in self.removed:
            del adapters[name]
        lock = Lock(
            sources=[stored(source) for source in self.plan.sources],
            adapters=sorted(adapters.values(), key=lambda entry: entry.name.encode()),
        )
        orphans = adapters.keys() - {name for source in lock.sources for name in source.adapters}
        if orphans:
            names = f"{min(orphans)!r}{f' and {len(orphans) - 1} more' if len(orphans) > 1 else ''}"
            self.progress.note(
                f"no source names {names} any more; «prune» with the sources removes what they do not name"
            )
        workspace.finish(lock)
        self.complete = True

    def report(self, seconds: float) -> FetchReport:
        """What was done; with ``dry_run`` what would be."""
        adapters = [
            self._fetched(requested)
            for requested in self.plan.requested
            if requested.name in self.states and (self.options.dry_run or self._is_in_place(requested))
        ]
        statuses = Counter(adapter.status for adapter in adapters)
        removed = self.removed if self.complete or self.options.dry_run else []
        return FetchReport(
            directory=os.fsencode(self.directory).decode(errors="backslashreplace"),
            dry_run=self.options.dry_run,
            locked=self.options.locked,
            complete=self.complete,
            adapters=adapters,
            removed=removed,
            left_out=self.plan.left_out,
            failures=[self._failure(failure) for failure in self.plan.failures],
            summary=FetchSummary(
                adapters=len(adapters),
                new=statuses["new"],
                updated=statuses["updated"],
                restored=statuses["restored"],
                present=statuses["present"],
                removed=len(removed),
                left_out=len(self.plan.left_out),
                failures=len(self.plan.failures),
                size_bytes=sum(adapter.size_bytes for adapter in adapters),
                bytes_downloaded=self.hub.downloaded,
                seconds=seconds,
            ),
        )

    def _failure(self, failure: Failure) -> FetchFailure:
        error = failure.error
        return FetchFailure(
            what=failure.what,
            slug=error.slug,
            exit_code=error.exit_code,
            message=str(error),
            skippable=failure.can_be_skipped and not self.options.locked,
        )

    def _is_in_place(self, requested: RequestedAdapter) -> bool:
        return requested.name in self.entries and (self.complete or not self._waits(requested))

    def _fetched(self, requested: RequestedAdapter) -> FetchedAdapter:
        state, entry, old = (
            self.states[requested.name],
            self.entries.get(requested.name),
            self.before.get(requested.name),
        )
        moved = old is not None and old.origin.commit != requested.origin.commit
        return FetchedAdapter(
            name=requested.name,
            origin=requested.origin,
            base_model=requested.base_model,
            files=len(requested.files),
            size_bytes=entry.size_bytes if entry else requested.size_bytes,
            status=state.status,
            previous_commit=old.origin.commit if old and moved else None,
            changed_files=list(state.changed),
        )

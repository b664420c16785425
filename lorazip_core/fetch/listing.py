"""From sources to adapters: which repositories, at which commit, which of their files."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..adapter.discovery import AdapterFolder, find_adapters, presence, weights_beside
from ..adapter.formats.format import NotLora
from ..adapter.formats.names import CONFIG_NAME, INDEX, PICKLE, SAFETENSORS, SHARD
from ..adapter.formats.registry import parse_config
from ..adapter.lock import LeftOut, Origin, is_inner_path
from ..adapter.reader import open_adapter
from ..base.digests import sha256_file
from ..base.errors import AdapterError, LorazipError, UsageError
from ..base.text import count, megabytes, printable
from .hub import Hub, Snapshot
from .hub_errors import HubRefused, HubUnavailable, RevisionGone
from .requested import RequestedAdapter, RequestedFile, label_of
from .sources import AuthorSource, CollectionSource, DirectorySource, RepositorySource, Source

README = "README.md"


@dataclass(frozen=True)
class Failure:
    """One thing that was asked for and cannot be had; ``what`` names it."""

    what: str
    error: LorazipError

    @property
    def can_be_skipped(self) -> bool:
        """Whether ``skip_bad`` goes on without it: a bad adapter, or what the Hub refuses, but not an outage."""
        return isinstance(self.error, AdapterError | HubRefused)

    def left_out(self, because: Literal["listing", "max-size", "skip-bad"]) -> LeftOut:
        """The same, where it is no failure."""
        reason = self.error.reason if isinstance(self.error, AdapterError) else str(self.error)
        return LeftOut(self.what, reason.removeprefix(f"{self.what}: "), because)


@dataclass(frozen=True)
class Limits:
    """What an adapter must not exceed or need, whatever its source."""

    max_bytes: int | None
    allow_pickle: bool


@dataclass(frozen=True)
class Lookup:
    """A repository to look into; one that was asked for by name (``named``) has to have an adapter."""

    repository: str
    revision: str | None = None
    subfolder: str = ""
    base_model: str | None = None
    named: bool = field(default=True, compare=False)


Found = RequestedAdapter | LeftOut | Failure


def lookups(source: Source, hub: Hub) -> Iterator[Lookup | LeftOut]:
    """The repositories that a source of the Hub stands for, and its items that are not models. Raises HubError."""
    base_model = source.filters.base_model if source.filters else None
    match source:
        case RepositorySource(repository=repository, revision=revision, subfolder=subfolder):
            yield Lookup(repository, revision, subfolder, base_model)
        case CollectionSource(slug=slug):
            for kind, item in hub.collection(slug):
                if kind == "model":
                    yield Lookup(item, base_model=base_model, named=False)
                else:
                    yield LeftOut(item, f"a {kind}, not a model")
        case AuthorSource(name=name, filters=filters):
            taken, empty = 0, True
            for repository, has_adapter in hub.repositories_of(name, filters):
                empty = False
                if not has_adapter:
                    yield LeftOut(repository, f"no {CONFIG_NAME}: not an adapter")
                elif filters.limit is None or taken < filters.limit:
                    taken += 1
                    yield Lookup(repository, base_model=base_model, named=False)
            if empty:
                raise HubRefused(f"{source.text}: the Hub lists no model that matches", "check the name and filters")


@dataclass(frozen=True)
class Candidate:
    """A folder of a repository that has the configuration of an adapter, and the files in it."""

    lookup: Lookup
    snapshot: Snapshot
    folder: str
    files: tuple[RequestedFile, ...]


def candidates(lookup: Lookup, pinned: str | None, hub: Hub) -> list[Candidate | LeftOut | Failure]:
    """The adapters of one repository: in its root, or else in its folders; or why there is none.

    They are looked for at the commit ``pinned``, if the Hub still has it. Raises HubUnavailable.
    """
    try:
        snapshot = _snapshot(lookup, pinned, hub)
    except HubUnavailable:
        raise
    except LorazipError as error:
        return [Failure(lookup.repository, error)]
    folders: defaultdict[str, list[RequestedFile]] = defaultdict(list)
    for file in snapshot.files:
        folders[file.path.rpartition("/")[0]].append(file)
    holders = [folder for folder, files in folders.items() if any(file.name == CONFIG_NAME for file in files)]
    start = f"{lookup.subfolder}/" if lookup.subfolder else ""
    asked = [folder for folder in holders if folder == lookup.subfolder or folder.startswith(start)]
    found: list[Candidate | LeftOut | Failure] = []
    for folder, below in _outermost(asked).items():
        found.append(Candidate(lookup, snapshot, folder, tuple(folders[folder])))
        if below:
            found.append(_inner(label_of(lookup.repository, folder), below))
    if not asked:
        within = f" in {lookup.subfolder}" if lookup.subfolder else ""
        found.append(_misfit(lookup, AdapterError(lookup.repository, f"no {CONFIG_NAME}{within}: not an adapter")))
    return found


def _outermost(folders: Iterable[str]) -> dict[str, int]:
    """The folders that are in none of the others, in order, and how many of these are in each; "" is the root."""
    known = set(folders)
    found: dict[str, int] = {}
    for folder in sorted(known):
        parts = folder.split("/")
        above = ("/".join(parts[:length]) for length in range(len(parts)))
        outer = next((each for each in above if each in known and each != folder), folder)
        found[outer] = found.get(outer, -1) + 1
    return found


def _inner(label: str, number: int) -> LeftOut:
    return LeftOut(f"{label}/…", f"{count(number, 'more adapter')} in folders of an adapter; name a folder to have it")


def _beside(label: str, names: Sequence[str]) -> LeftOut:
    """Files with weights that are not the adapter's own."""
    more = f" and {len(names) - 3:,} more" if names[3:] else ""
    files = ", ".join(map(printable, names[:3]))
    return LeftOut(label, f"{files}{more}: beside the adapter, and not fetched with it")


def _snapshot(lookup: Lookup, pinned: str | None, hub: Hub) -> Snapshot:
    if pinned is not None:
        with contextlib.suppress(RevisionGone):
            return hub.snapshot(lookup.repository, pinned)
    return hub.snapshot(lookup.repository, lookup.revision)


def adapter_of(candidate: Candidate, hub: Hub, limits: Limits) -> list[Found]:
    """The adapter in a folder, once its configuration has been read, or why it is none; and what is left out beside it.

    Raises HubUnavailable.
    """
    lookup, snapshot, folder = candidate.lookup, candidate.snapshot, candidate.folder
    label = label_of(snapshot.repository, folder)
    if folder and not is_inner_path(folder):
        return [LeftOut(label, "the path of its folder is unsafe")]
    try:
        files = _chosen(label, candidate.files, limits.allow_pickle)
        config_file = next(file for file in files if file.name == CONFIG_NAME)
        path, _ = hub.file(snapshot.repository, snapshot.commit, config_file, lambda count: None)
        base_model = parse_config(label, path.read_bytes()).base_model
    except NotLora as error:
        return [_misfit(lookup, error)]
    except HubUnavailable:
        raise
    except LorazipError as error:
        return [Failure(label, error)]
    origin = Origin(
        repository=snapshot.repository,
        revision=lookup.revision,
        commit=snapshot.commit,
        subfolder=folder,
        license=snapshot.license,
    )
    found = _within_limits(RequestedAdapter(origin, base_model, files), lookup.base_model, lookup.named, limits)
    names = {file.name for file in candidate.files} - {file.name for file in files}
    others = weights_beside(names) if isinstance(found, RequestedAdapter) else ()
    return [found, _beside(label, others)] if others else [found]


def _chosen(label: str, files: Iterable[RequestedFile], allow_pickle: bool) -> tuple[RequestedFile, ...]:
    """The files of an adapter that are needed: configuration, weights, model card."""
    here = {file.name: file for file in files}
    names = [CONFIG_NAME, *([README] if README in here else [])]
    if SAFETENSORS in here:
        names.append(SAFETENSORS)
    elif INDEX in here:
        names += [INDEX, *filter(SHARD.fullmatch, here)]
    elif PICKLE not in here:
        raise AdapterError(label, f"no weights: neither {SAFETENSORS} nor {INDEX}")
    elif allow_pickle:
        names.append(PICKLE)
    else:
        raise AdapterError(
            label, f"{PICKLE} is pickled, and a pickle can run code", "«allow_pickle» fetches and reads it safely"
        )
    return tuple(here[name] for name in sorted(names))


def _within_limits(requested: RequestedAdapter, base_model: str | None, named: bool, limits: Limits) -> Found:
    if base_model is not None and requested.base_model != base_model:
        reason = f"its base model is {requested.base_model}, not {base_model}"
        failure = Failure(requested.label, AdapterError(requested.label, reason))
        return failure if named else failure.left_out("listing")
    if limits.max_bytes is not None and requested.size_bytes > limits.max_bytes:
        reason = f"it has {megabytes(requested.size_bytes)}, more than the {megabytes(limits.max_bytes)} allowed"
        failure = Failure(requested.label, AdapterError(requested.label, reason))
        return failure if named else failure.left_out("max-size")
    return requested


def _misfit(lookup: Lookup, error: AdapterError) -> LeftOut | Failure:
    """What is no LoRA adapter: left out of what was found by listing, a failure where it was asked for by name."""
    failure = Failure(error.adapter, error)
    return failure if lookup.named else failure.left_out("listing")


def local_adapters(
    source: DirectorySource, target: Path, limits: Limits, license_of: Callable[[Path], str | None]
) -> list[Found]:
    """The adapters below a local directory, links followed, except those in the folder of another.

    Raises UsageError for a link that leads to ``target``, the output: a run would fetch what the one before wrote.
    """
    there = find_adapters(source.path)
    real_target = os.path.realpath(target)
    folders = {"" if each.name == "." else each.name: each for each in there.adapters}

    def label(name: str) -> str:
        return label_of(source.text, printable(name))

    found: list[Found] = [LeftOut(label(left.name), left.reason) for left in there.left_out]
    for name, below in _outermost(folders).items():
        folder = folders[name]
        if Path(folder.real).is_relative_to(real_target):
            where = f"{label(name)!r} is in «output» {str(target)!r}"
            raise UsageError(where, "choose another «output», or remove the link")
        try:
            found += _local_adapter(source, name, folder, limits, license_of)
        except NotLora as error:
            found.append(LeftOut(label(name), error.reason))
        except AdapterError as error:
            found.append(Failure(label(name), error))
        if below:
            found.append(_inner(label(name), below))
    if not folders:
        nothing = AdapterError(source.text, f"no {CONFIG_NAME} at or below it: no adapters here")
        found.append(Failure(source.text, nothing))
    return found


def _local_adapter(
    source: DirectorySource,
    subfolder: str,
    folder: AdapterFolder,
    limits: Limits,
    license_of: Callable[[Path], str | None],
) -> list[Found]:
    """One of them, and what is left out beside it. Raises AdapterError."""
    label = label_of(source.text, printable(subfolder))
    if printable(subfolder) != subfolder:
        raise AdapterError(label, "the name of its folder is not UTF-8", "rename it")
    adapter = open_adapter(label, folder.folder, allow_pickle=limits.allow_pickle, present=presence(label))
    card = folder.folder / README
    paths = [*adapter.files, *([card] if card.is_file() else [])]
    files = tuple(RequestedFile(path.name, str(path), path.stat().st_size, sha256_file(path)) for path in sorted(paths))
    origin = Origin(directory=source.text, subfolder=subfolder, license=license_of(card))
    requested = RequestedAdapter(origin, adapter.config.base_model, files, local=folder.folder)
    found = _within_limits(requested, source.filters.base_model if source.filters else None, False, limits)
    own = {path.name for path in adapter.files}
    others = [name for name in folder.beside if name not in own] if found is requested else []
    return [found, _beside(label, others)] if others else [found]

"""A directory of adapters of one base model: found, opened, and checked against each other."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from ..base.errors import AdapterError, AdapterErrors, UsageError
from ..base.text import printable
from .discovery import AdapterFolder, Skipped, find_adapters, presence
from .formats.foreign import foreign_adapters, refuse_foreign_file
from .formats.names import CONFIG_NAME
from .module import Module, Part
from .reader import Adapter, Known, distinct_parts, open_adapter


@dataclass(frozen=True)
class Collection:
    """Adapters in the order of their names as UTF-8 bytes, and the modules that any of them has, by name."""

    root: Path
    adapters: tuple[Adapter, ...]
    skipped: tuple[Skipped, ...]
    modules: tuple[Module, ...]
    base_model: str | None
    no_adapters: frozenset[str] = frozenset()
    """The names in ``skipped`` of what is no adapter of its own: see `Found.left_out`."""
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By adapter, the files in its folder with weights that are not its own (`weights_beside`)."""

    def without(self, bad: list[AdapterError]) -> Collection:
        """The collection less adapters that turned out bad later. Raises AdapterErrors when none is left."""
        names = {error.adapter for error in bad}
        left = [adapter for adapter in self.adapters if adapter.name not in names]
        return replace(_collect(self.root, left, self.skipped, bad, self.left_out), no_adapters=self.no_adapters)


class Company(NamedTuple):
    """What adapters are to join: their base model and their modules have to be those of the others there."""

    where: str
    """The place in words: "the bundle"."""
    base_model: str | None
    modules: Mapping[str, Module]
    """By name."""


def open_collection(
    root: Path,
    *,
    allow_pickle: bool = False,
    allow_mixed_base: bool = False,
    skip_bad: bool = False,
    company: Company | None = None,
) -> Collection:
    """Open every adapter below ``root``, which have to fit each other, and ``company`` if they are to join one.

    Raises AdapterErrors with every adapter that cannot be used, unless ``skip_bad``: then they are listed in
    ``skipped``, and the errors are raised only when nothing is left. For what may not be read, PermissionError.
    """
    if not root.is_dir():
        refuse_foreign_file(root)
        if root.exists():
            raise UsageError(f"{root} is a file, not a directory of adapters", "name a directory")
        raise UsageError(f"{root} is not a directory")
    found = find_adapters(root)
    adapters, bad = _open_all(found.adapters, allow_pickle)
    bad += foreign_adapters(root, {each.folder for each in found.adapters})
    if not found.adapters and not bad:
        raise AdapterErrors([_nothing(root, found.left_out)])
    for check in (_other_shape,) if allow_mixed_base else (_other_base, _other_shape):
        misfits = check(adapters, company)
        bad += misfits
        names = {error.adapter for error in misfits}
        adapters = [adapter for adapter in adapters if adapter.name not in names]
    if bad and not skip_bad:
        raise AdapterErrors(bad)
    left_out = _beside(adapters, found.adapters)
    collection = _collect(root, adapters, found.left_out, bad, left_out)
    return replace(collection, no_adapters=frozenset(skipped.name for skipped in found.left_out))


def _open_all(folders: Sequence[AdapterFolder], allow_pickle: bool) -> tuple[list[Adapter], list[AdapterError]]:
    """Those of the adapters that can be used, and for each other one why it cannot."""
    known = Known()
    adapters: list[Adapter] = []
    bad: list[AdapterError] = []
    for name, folder, _, _ in folders:
        try:
            _refuse_unprintable(name)
            present = presence(name)
            adapters.append(open_adapter(name, folder, allow_pickle=allow_pickle, known=known, present=present))
        except AdapterError as error:
            bad.append(error)
    return adapters, bad


def _beside(adapters: Sequence[Adapter], folders: Sequence[AdapterFolder]) -> dict[str, tuple[str, ...]]:
    """See `Collection.left_out`. Which shards are an adapter's own, its index says: it may name them as it likes."""
    beside = {each.name: each.beside for each in folders}
    left_out = {}
    for adapter in adapters:
        own = {path.name for path in adapter.files}
        if others := tuple(printable(file) for file in beside[adapter.name] if file not in own):
            left_out[adapter.name] = others
    return left_out


def _nothing(root: Path, left_out: tuple[Skipped, ...]) -> AdapterError:
    reason = f"no {CONFIG_NAME} at or below it: no adapters here"
    if not left_out:
        return AdapterError(str(root), reason)
    more = f" and {len(left_out) - 1:,} more" if left_out[1:] else ""
    return AdapterError(str(root), reason, f"left out: {left_out[0].name!r} ({left_out[0].reason}){more}")


def _refuse_unprintable(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise AdapterError(printable(name), "the name of its folder is not UTF-8", "rename it") from None


def _collect(
    root: Path,
    adapters: list[Adapter],
    skipped: tuple[Skipped, ...],
    bad: list[AdapterError],
    left_out: Mapping[str, tuple[str, ...]],
) -> Collection:
    if not adapters:
        raise AdapterErrors(bad)
    modules = {part.module for parts, _ in distinct_parts(adapters) for part in parts.values()}
    return Collection(
        root,
        tuple(adapters),
        tuple(sorted((*skipped, *(Skipped(error.adapter, error.reason) for error in bad)))),
        tuple(sorted(modules)),
        adapters[0].config.base_model,
        left_out={adapter.name: left_out[adapter.name] for adapter in adapters if adapter.name in left_out},
    )


def _other_base(adapters: list[Adapter], company: Company | None) -> list[AdapterError]:
    counts = Counter(adapter.config.base_model for adapter in adapters)
    if company is not None:
        usual, who = company.base_model, f"{company.where} has {company.base_model!r}"
    elif len(counts) < 2:
        return []
    else:
        usual, count = counts.most_common(1)[0]
        who = f"{count} of {len(adapters)} adapters here have {usual!r}"
    return [
        AdapterError(
            adapter.name,
            f"base model {adapter.config.base_model!r}, but {who}",
            "one collection, one base model; «allow_mixed_base» if these are the same weights under two names",
        )
        for adapter in adapters
        if adapter.config.base_model != usual
    ]


def _other_shape(adapters: list[Adapter], company: Company | None) -> list[AdapterError]:
    shapes: defaultdict[str, Counter[Module]] = defaultdict(Counter)
    distinct = distinct_parts(adapters)
    for parts, count in distinct:
        for name, part in parts.items():
            shapes[name][part.module] += count
    usual = {name: counter.most_common(1)[0][0] for name, counter in shapes.items()}
    there = {} if company is None else company.modules
    usual |= {name: there[name] for name in usual.keys() & there.keys()}
    odd = {id(parts): _first_odd(parts, usual) for parts, _ in distinct}
    bad = []
    for adapter in adapters:
        if module := odd[id(adapter.parts)]:
            who = f"{company.where} has" if company and module.name in there else "most adapters here have"
            reason = f"module {module.name} is {module.shape}, but {who} {usual[module.name].shape}"
            bad.append(AdapterError(adapter.name, reason, "is its base model another one?"))
    return bad


def _first_odd(parts: dict[str, Part], usual: dict[str, Module]) -> Module | None:
    return next((part.module for name, part in parts.items() if part.module != usual[name]), None)

"""A directory of adapters of one base model: found, opened, and checked against each other."""

from __future__ import annotations

import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import AdapterError, AdapterErrors, UsageError
from .config import CONFIG_NAME
from .foreign import foreign_adapters, foreign_format
from .module import Module
from .reader import Adapter, Alike, Part, open_adapter


class Skipped(NamedTuple):
    """An adapter that was left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Collection:
    """Adapters in the order of their names as UTF-8 bytes, and the modules that any of them has, by name."""

    root: Path
    adapters: tuple[Adapter, ...]
    skipped: tuple[Skipped, ...]
    modules: tuple[Module, ...]
    base_model: str | None

    def without(self, bad: list[AdapterError]) -> Collection:
        """The collection less adapters that turned out bad later. Raises AdapterErrors when none is left."""
        names = {error.adapter for error in bad}
        return _collect(self.root, [a for a in self.adapters if a.name not in names], self.skipped, bad)


def find_adapters(root: Path) -> Iterator[tuple[str, Path]]:
    """(name, folder) of every directory at or below ``root`` with an ``adapter_config.json``.

    Hidden folders, and links that lead outside of ``root``, are skipped.
    """
    real_root = Path(os.path.realpath(root))

    def is_inside(entry: os.DirEntry[str]) -> bool:
        return not entry.is_symlink() or inside(real_root, Path(entry.path))  # only a link leads elsewhere

    def walk(folder: str, real: str, name: str, above: frozenset[str]) -> Iterator[str]:
        if real in above:
            return
        try:
            with os.scandir(folder) as listed:
                entries = list(listed)
        except OSError:
            if not name:
                raise
            yield name  # there may be adapters: opening it says why nobody knows
            return
        for entry in entries:
            if entry.name == CONFIG_NAME and entry.is_file() and is_inside(entry):
                yield name
        for entry in entries:
            if not entry.name.startswith(".") and entry.is_dir() and is_inside(entry):
                real_entry = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                yield from walk(entry.path, real_entry, os.path.join(name, entry.name), above | {real})

    names = (name or "." for name in walk(os.fspath(root), os.fspath(real_root), "", frozenset()))
    yield from ((name, root / name) for name in sorted(names, key=os.fsencode))


def inside(real_root: Path, path: Path) -> bool:
    """Whether ``path``, links resolved, is ``real_root`` or below it."""
    return Path(os.path.realpath(path)).is_relative_to(real_root)


def open_collection(
    root: Path, *, allow_pickle: bool = False, allow_mixed_base: bool = False, skip_bad: bool = False
) -> Collection:
    """Open every adapter below ``root``.

    Raises AdapterErrors with every adapter that cannot be used, unless ``skip_bad``: then they are listed in
    ``skipped``, and the errors are raised only when nothing is left.
    """
    if not root.is_dir():
        if form := foreign_format(root):
            raise AdapterErrors([AdapterError(str(root), f"it is a LoRA of {form.owner}, not of PEFT", form.hint)])
        raise UsageError(f"{root} is not a directory")
    real_root = Path(os.path.realpath(root))

    def present(path: Path) -> bool:
        """Whether it is a file, and inside: its folder is, so that only a link has to be followed."""
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, ValueError):
            return False
        return stat.S_ISREG(mode) or (stat.S_ISLNK(mode) and path.is_file() and inside(real_root, path))

    alike = Alike()
    adapters: list[Adapter] = []
    bad: list[AdapterError] = []
    folders = dict(find_adapters(root))
    for name, folder in folders.items():
        try:
            _refuse_unprintable(name)
            adapters.append(open_adapter(name, folder, allow_pickle=allow_pickle, alike=alike, present=present))
        except AdapterError as error:
            bad.append(error)
    bad += foreign_adapters(root, set(folders.values()))
    if not adapters and not bad:
        raise AdapterErrors([AdapterError(str(root), f"no {CONFIG_NAME} at or below it: no adapters here")])
    for misfits in (_other_base(adapters, allow_mixed_base), _other_shape(adapters)):
        bad += misfits
        names = {error.adapter for error in misfits}
        adapters = [adapter for adapter in adapters if adapter.name not in names]
    if bad and not skip_bad:
        raise AdapterErrors(bad)
    return _collect(root, adapters, (), bad)


def _refuse_unprintable(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        printable = name.encode("utf-8", "backslashreplace").decode()
        raise AdapterError(printable, "the name of its folder is not UTF-8", "rename it") from None


def _collect(root: Path, adapters: list[Adapter], skipped: tuple[Skipped, ...], bad: list[AdapterError]) -> Collection:
    if not adapters:
        raise AdapterErrors(bad)
    modules = {part.module for parts, _ in _distinct(adapters) for part in parts.values()}
    return Collection(
        root,
        tuple(adapters),
        tuple(sorted((*skipped, *(Skipped(error.adapter, error.reason) for error in bad)))),
        tuple(sorted(modules)),
        adapters[0].config.base_model,
    )


def _other_base(adapters: list[Adapter], allow_mixed_base: bool) -> list[AdapterError]:
    counts = Counter(adapter.config.base_model for adapter in adapters)
    if allow_mixed_base or len(counts) < 2:
        return []
    usual, count = counts.most_common(1)[0]
    return [
        AdapterError(
            adapter.name,
            f"base model {adapter.config.base_model!r}, but {count} of {len(adapters)} adapters here have {usual!r}",
            "one collection, one base model; --allow-mixed-base if these are the same weights under two names",
        )
        for adapter in adapters
        if adapter.config.base_model != usual
    ]


def _other_shape(adapters: list[Adapter]) -> list[AdapterError]:
    shapes: defaultdict[str, Counter[Module]] = defaultdict(Counter)
    for parts, count in _distinct(adapters):
        for name, part in parts.items():
            shapes[name][part.module] += count
    usual = {name: counter.most_common(1)[0][0] for name, counter in shapes.items()}
    odd = {id(parts): _first_odd(parts, usual) for parts, _ in _distinct(adapters)}
    bad = []
    for adapter in adapters:
        if module := odd[id(adapter.parts)]:
            reason = f"module {module.name} is {module.shape}, but most adapters here have {usual[module.name].shape}"
            bad.append(AdapterError(adapter.name, reason, "is its base model another one?"))
    return bad


def _first_odd(parts: dict[str, Part], usual: dict[str, Module]) -> Module | None:
    return next((part.module for name, part in parts.items() if part.module != usual[name]), None)


def _distinct(adapters: list[Adapter]) -> list[tuple[dict[str, Part], int]]:
    """The parts that adapters have, in order, and how many adapters share each."""
    parts = {id(adapter.parts): adapter.parts for adapter in adapters}
    counts = Counter(id(adapter.parts) for adapter in adapters)
    return [(each, counts[key]) for key, each in parts.items()]

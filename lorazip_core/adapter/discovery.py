"""Which folders of a directory are adapters, links followed, and what there looks like one and is left out.

Links are followed because they are how people put collections together, and what the Hub's cache is made of: these are
the user's own directories. What `fetch` brings from a repository never is a link, and `fetch` checks that itself.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from ..base.errors import AdapterError
from ..base.text import printable
from .formats.names import CONFIG_NAME
from .formats.registry import FORMATS

_EXTENSIONS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".npy", ".npz", ".pkl", ".pt", ".pth", ".safetensors")
_OWN = tuple(prefix for form in FORMATS for prefix in form.weights.prefixes)
_WEIGHTS = tuple(name for form in FORMATS for name in form.weights.names)
_TRAINING_STATE = re.compile(
    r"(optimizer|scheduler|lr_scheduler|scaler|sampler|rng_state|random_states|training_args|tokenizer)(_\d+)*\.\w+"
)


class Skipped(NamedTuple):
    """An adapter that was left out, and why."""

    name: str
    reason: str


class AdapterFolder(NamedTuple):
    """A folder with a `CONFIG_NAME`; its name is its POSIX path below the directory that was searched."""

    name: str
    folder: Path
    real: str
    """The path of the same folder, links resolved."""
    beside: tuple[str, ...]
    """The names of its files that `weights_beside` selects."""


class Found(NamedTuple):
    """What `find_adapters` finds, both in the order of the names as UTF-8 bytes."""

    adapters: tuple[AdapterFolder, ...]
    left_out: tuple[Skipped, ...]
    """Links that lead to nothing or to what is there by another name, and weights without a configuration."""


def find_adapters(root: Path) -> Found:
    """Every directory at or below ``root`` with a `CONFIG_NAME`; hidden folders are skipped.

    A folder that can be reached in several ways has the name without links, or else the first of the names. The other
    ways are left out and named, if there is an adapter at or below the folder.

    A folder that cannot be listed, or a link that cannot be followed, is taken for an adapter: opening it says what is
    wrong. Raises OSError for a ``root`` that cannot be listed.
    """
    search = _Search(root)
    search.folder("", os.fspath(root), os.path.realpath(root))
    while search.links:
        links, search.links = sorted(search.links, key=lambda link: os.fsencode(link.name)), []
        for link in links:
            search.follow(link)
    return search.found()


def weights_beside(names: Iterable[str]) -> tuple[str, ...]:
    """Of the files in the folder of an adapter, those with weights that are not the adapter's own, sorted.

    Whoever gets the adapter back from a bundle would miss them: value heads, projectors, modules saved separately,
    ``non_lora_trainables.bin``. A file counts by its extension, unless its name is that of the adapter's weights, of
    training state (optimizer, scheduler, random states, arguments) or of a tokenizer.
    """
    return tuple(
        sorted(
            name
            for name in names
            if name.lower().endswith(_EXTENSIONS) and not (name.startswith(_OWN) or _TRAINING_STATE.fullmatch(name))
        )
    )


def presence(adapter: str) -> Callable[[Path], bool]:
    """The test whether a file of ``adapter`` is there, links followed.

    It raises AdapterError for a link to nothing, which is no reason to go on without the file, and PermissionError.
    """

    def present(path: Path) -> bool:
        try:
            return stat.S_ISREG(os.stat(path).st_mode)
        except PermissionError:
            raise
        except (OSError, ValueError):
            if os.path.islink(path):
                raise AdapterError(
                    adapter, f"{path.name} is a link to nothing", "restore the file or the cache that it leads to"
                ) from None
            return False

    return present


class _Link(NamedTuple):
    name: str
    path: str
    in_adapter: bool


class _Search:
    """The state of `find_adapters`. Links wait until all is searched that can be reached without them."""

    def __init__(self, root: Path) -> None:
        self.links: list[_Link] = []
        self._root = root
        self._adapters: list[AdapterFolder] = []
        self._left_out: list[Skipped] = []
        self._names: dict[str, str] = {}  # of every folder that was searched, by its real path
        self._again: list[tuple[str, str]] = []  # the name and real path of a folder reached once more

    def folder(self, name: str, path: str, real: str) -> None:
        """Search ``path``, whose real path is ``real``, and all below it but for links."""
        if real in self._names:
            self._again.append((name, real))
            return
        self._names[real] = name or "."
        try:
            with os.scandir(path) as listed:
                entries = {entry.name: entry for entry in listed}
        except OSError:
            if not name:
                raise
            self._adapters.append(AdapterFolder(name, self._root / name, real, ()))
            return
        config = entries.get(CONFIG_NAME)
        is_adapter = config is not None and (config.is_file() if not config.is_symlink() else _may_be_file(config.path))
        if is_adapter:
            beside = weights_beside(entries)
            self._adapters.append(AdapterFolder(name or ".", self._root / name, real, beside))
        elif weights := next((own for own in _WEIGHTS if own in entries), None):
            self._leave_out(name or ".", f"{weights} without {CONFIG_NAME}")
        for entry in entries.values():
            if entry.name.startswith("."):
                continue
            inner = os.path.join(name, entry.name)
            if entry.is_symlink():
                self.links.append(_Link(inner, entry.path, is_adapter))
            elif entry.is_dir():
                self.folder(inner, entry.path, os.path.join(real, entry.name))

    def follow(self, link: _Link) -> None:
        """Search what a link leads to, if that is a folder."""
        try:
            mode = _mode(link.path)
        except PermissionError:
            self._adapters.append(AdapterFolder(link.name, self._root / link.name, link.path, ()))
            return
        if stat.S_ISDIR(mode):
            self.folder(link.name, link.path, os.path.realpath(link.path))
        elif not mode and not link.in_adapter:  # which files an adapter needs, its reader knows
            self._leave_out(link.name, "a link to nothing")

    def found(self) -> Found:
        if self._again:
            self._name_again()
        return Found(
            tuple(sorted(self._adapters, key=lambda each: os.fsencode(each.name))),
            tuple(sorted(self._left_out, key=lambda each: each.name.encode())),
        )

    def _name_again(self) -> None:
        """Name the other ways to folders, if there is an adapter at or below them."""
        reals = {os.fspath(above) for each in self._adapters for above in (Path(each.real), *Path(each.real).parents)}
        names = {os.fspath(above) for each in self._adapters for above in (Path(each.name), *Path(each.name).parents)}
        for name, real in self._again:
            there = self._names[real]
            if real in reals or there in names:
                self._leave_out(name, f"the same folder as {there!r}")

    def _leave_out(self, name: str, reason: str) -> None:
        self._left_out.append(Skipped(printable(name), reason))


def _may_be_file(link: str) -> bool:
    """Whether a link leads to a file, or to what nobody knows: opening the adapter says what is wrong with it."""
    try:
        return stat.S_IFMT(_mode(link)) in (0, stat.S_IFREG)
    except PermissionError:
        return True


def _mode(path: str) -> int:
    """The mode of what is at the end of all links; 0 where they end nowhere."""
    try:
        return os.stat(path).st_mode
    except PermissionError:
        raise
    except OSError:
        return 0

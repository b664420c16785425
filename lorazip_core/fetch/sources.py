"""What ``fetch`` can be asked for, read from the words of a command line or of a list file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public by its documentation

from ..adapter.lock import Filters, Lock, is_inner_path
from ..base.errors import UsageError
from ..bundle.kinds import check_adapters_path
from .address import source_of_address

_ID = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"(?P<repository>{_ID}/{_ID})(?:/(?P<subfolder>[^@]+?))?/?(?:@(?P<revision>[^\s@]+))?")
_COLLECTION = re.compile(rf"collection:(?P<slug>{_ID}/{_ID})")
_AUTHOR = re.compile(rf"(?:org|user):(?P<name>{_ID})")
_GRAMMAR = "none of owner/repo[/subfolder][@revision], collection:owner/slug, org:NAME, user:NAME, @list.txt, ./dir"


@dataclass(frozen=True)
class RepositorySource:
    """A repository of the Hub, or the adapters of one of its folders."""

    text: str
    repository: str
    subfolder: str
    revision: str | None
    filters: Filters | None = None


@dataclass(frozen=True)
class CollectionSource:
    """A collection of the Hub."""

    text: str
    slug: str
    filters: Filters | None = None


@dataclass(frozen=True)
class AuthorSource:
    """All adapters of an organisation or a user, narrowed down by filters."""

    text: str
    name: str
    filters: Filters


@dataclass(frozen=True)
class DirectorySource:
    """The adapters below a local directory."""

    text: str
    path: Path
    filters: Filters | None = None


Source = RepositorySource | CollectionSource | AuthorSource | DirectorySource


def read_sources(words: Iterable[str], target: Path, filters: Filters) -> list[Source]:
    """The sources that ``words`` name, ``@list.txt`` replaced by its lines, each source once, in order.

    ``target`` is the directory of the lock, which local directories are recorded relative to. Raises UsageError for
    what is no source (in a list by its line), and for filters that nothing here can use.
    """
    found: dict[Source, None] = {}
    for word in words:
        for text, line, base in _lines(word):
            try:
                found[_parse(text, base, target, filters)] = None
            except UsageError as error:
                raise UsageError(f"{line}{error.message}", error.hint) from None
    narrows = filters.search is not None or filters.tags or filters.limit is not None
    if narrows and not any(isinstance(source, AuthorSource) for source in found):
        raise UsageError("«search», «tags» and «limit» narrow down org:NAME and user:NAME, and there is none")
    return list(found)


def sources_of(lock: Lock, directory: Path) -> list[Source]:
    """The sources of the lock of ``directory``, as they were asked for."""
    return [_parse(locked.source, directory, directory, locked.filters or Filters()) for locked in lock.sources]


def _lines(word: str) -> Iterator[tuple[str, str, Path]]:
    """(source, where it stands, the directory that it is relative to) for a word of the command line."""
    if not word.startswith("@"):
        yield word, "", Path()
        return
    path = Path(word[1:])
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{word}: there is no file {str(path)!r}") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise UsageError(f"{word}: not a text file with one source a line") from None
    for number, line in enumerate(text.splitlines(), 1):
        if source := re.sub(r"(^|\s)#.*", "", line).strip():
            yield source, f"{path}:{number}: ", path.parent


def _parse(text: str, base: Path, target: Path, filters: Filters) -> Source:
    common = Filters(base_model=filters.base_model) if filters.base_model is not None else None
    if text.startswith((".", "/", "~")):
        return _directory(text, base, target, common)
    if text.startswith("@"):
        raise UsageError(f"{text!r}: a list cannot name another one")
    text = source_of_address(text) or text
    if match := _COLLECTION.fullmatch(text):
        return CollectionSource(text, match["slug"], common)
    if match := _AUTHOR.fullmatch(text):
        return AuthorSource(text, match["name"], filters)
    if match := _REPOSITORY.fullmatch(text):
        try:
            validate_repo_id(match["repository"])
        except HFValidationError:
            raise UsageError(f"{text!r}: {match['repository']!r} is no name of a repository") from None
        subfolder = match["subfolder"] or ""
        if subfolder and not is_inner_path(subfolder):
            raise UsageError(f"{text!r}: {subfolder!r} is no folder of a repository")
        return RepositorySource(text, match["repository"], subfolder, match["revision"], common)
    if (base / text).is_dir():
        raise UsageError(f"{text!r}: {_GRAMMAR}", f"for the directory write ./{text}")
    raise UsageError(f"{text!r}: {_GRAMMAR}")


def _directory(text: str, base: Path, target: Path, filters: Filters | None) -> DirectorySource:
    try:
        given = Path(text).expanduser()
    except RuntimeError:  # no such user
        raise UsageError(f"{text!r} is not a directory") from None
    path = given if given.is_absolute() else base / given
    if not path.is_dir():
        raise UsageError(f"{text!r} is not a directory")
    check_adapters_path(path, may_be_empty=True, typed=repr(text))
    if is_within(path, target) or is_within(target, path):
        raise UsageError(f"{text!r} and «output» {str(target)!r} lie in each other", "choose another «output»")
    recorded = given if given.is_absolute() else Path(os.path.relpath(os.path.realpath(path), os.path.realpath(target)))
    return DirectorySource(recorded.as_posix(), path, filters)


def is_within(path: Path, folder: Path) -> bool:
    """Whether ``path``, links resolved, is ``folder`` or below it."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))

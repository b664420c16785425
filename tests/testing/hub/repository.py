"""What a Hub holds: files with the two digests that it names them by, commits, repositories and collections."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

LFS_BYTES = 10 * 2**20
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".gguf", ".onnx")
CHUNK = 1 << 20

Content = bytes | Path
"""A path is read whenever it is served, so that a large collection isn't in memory as well as on the disk."""


class File:
    """The content of one file of a commit. Its digests are computed once, when the first commit has it."""

    def __init__(self, path: str, content: Content) -> None:
        self.path = path
        self.content = content
        self.size = len(content) if isinstance(content, bytes) else content.stat().st_size
        self.is_lfs = self.size >= LFS_BYTES or path.endswith(LFS_SUFFIXES)

    @cached_property
    def sha256(self) -> str:
        return self._digest(hashlib.sha256())

    @cached_property
    def blob_id(self) -> str:
        """What git calls the file: of a file in LFS, git knows nothing but the pointer to it."""
        if self.is_lfs:
            return hashlib.sha1(b"blob %d\0" % len(self.pointer) + self.pointer).hexdigest()
        return self._digest(hashlib.sha1(b"blob %d\0" % self.size))

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id

    def read(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()

    def _digest(self, digest: Any) -> str:
        if isinstance(self.content, bytes):
            digest.update(self.content)
        else:
            with self.content.open("rb") as file:
                _feed(digest, file)
        return str(digest.hexdigest())


def _feed(digest: Any, file: BinaryIO) -> None:
    while chunk := file.read(CHUNK):
        digest.update(chunk)


@dataclass(frozen=True)
class Commit:
    """The whole tree at one time. Paths are whatever a test wants to see listed and served, hostile ones included."""

    files: Mapping[str, File]
    parent: str | None = None
    message: str = "Update"

    @cached_property
    def sha(self) -> str:
        """Of content and parent alone, so that the same test sees the same commits every time."""
        digest = hashlib.sha1(f"commit {self.parent} {self.message}\0".encode())
        for path in sorted(self.files):
            digest.update(f"{path}\0{self.files[path].blob_id}\0".encode())
        return digest.hexdigest()


@dataclass
class Repository:
    """A model repository. All reading goes through one commit, so that a push while a file is sent changes nothing."""

    id: str
    private: bool = False
    gated: Literal[False, "auto", "manual"] = False
    readers: frozenset[str] = frozenset()
    """The users who may see it, if it's private, or have its files, if it's gated."""
    disabled: bool = False
    tags: tuple[str, ...] = ()
    card_data: dict[str, Any] = field(default_factory=dict)
    downloads: int = 0
    likes: int = 0
    last_modified: str = "2024-01-01T00:00:00.000Z"
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    git_tags: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, id: str, files: Mapping[str, Content], **settings: Any) -> Repository:
        repository = cls(id, **settings)
        repository.commit(files, message="initial commit")
        return repository

    @classmethod
    def from_directory(cls, id: str, directory: Path, **settings: Any) -> Repository:
        """The files of a directory, read when they are served."""
        files = {p.relative_to(directory).as_posix(): p for p in sorted(directory.rglob("*")) if p.is_file()}
        return cls.of(id, files, **settings)

    def commit(
        self,
        files: Mapping[str, Content],
        *,
        delete: tuple[str, ...] = (),
        branch: str = "main",
        message: str = "Update",
    ) -> str:
        """Push to a branch: these files change, the others stay. Returns the new commit's sha."""
        parent = self.branches.get(branch)
        old = dict(self.commits[parent].files) if parent else {}
        new = old | {path: File(path, content) for path, content in files.items()}
        return self._add(Commit({p: f for p, f in new.items() if p not in delete}, parent, message), branch)

    def squash(self, branch: str = "main") -> str:
        """One commit without a past in place of a branch's history, whose commits cannot be asked for any more."""
        gone: str | None = self.branches[branch]
        new = self._add(Commit(self.commits[self.branches[branch]].files, None, "Super-squash branch"), branch)
        while gone is not None and gone != new and gone in self.commits:
            gone = self.commits.pop(gone).parent
        return new

    def tag(self, name: str, sha: str | None = None) -> None:
        self.git_tags[name] = sha or self.head

    @property
    def head(self) -> str:
        return self.branches["main"]

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or a full sha stands for."""
        sha = self.branches.get(revision) or self.git_tags.get(revision) or revision
        return self.commits.get(sha)

    @property
    def all_tags(self) -> list[str]:
        """The given ones, and those that the Hub makes of a model card."""
        library, licence = self.card_data.get("library_name"), self.card_data.get("license")
        bases = self.card_data.get("base_model") or []
        tags = list(self.tags)
        tags += [library] if library else []
        for base in [bases] if isinstance(bases, str) else bases:
            tags += [f"base_model:{base}", *([f"base_model:adapter:{base}"] if library == "peft" else [])]
        tags += [f"license:{licence}"] if licence else []
        return list(dict.fromkeys([*tags, "region:us"]))

    def _add(self, commit: Commit, branch: str) -> str:
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit.sha


@dataclass(frozen=True)
class Item:
    """An entry of a collection, which may name something that no longer exists."""

    id: str
    type: Literal["model", "dataset", "space", "paper", "collection"] = "model"
    note: str | None = None


@dataclass(frozen=True)
class Collection:
    slug: str
    """owner/title-and-24-hex-digits, as in the address of its page."""
    items: tuple[Item, ...]
    title: str = "A collection"
    private: bool = False
    readers: frozenset[str] = frozenset()


@dataclass
class Catalogue:
    """All that one server holds, and who may see it. Tests change it while the server runs."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    collections: dict[str, Collection] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    """Token → user. A token that isn't here is invalid, and an invalid one is refused everywhere."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Old id → new id: the Hub redirects."""

    def add(self, *things: Repository | Collection) -> None:
        for thing in things:
            if isinstance(thing, Repository):
                self.repositories[thing.id] = thing
            else:
                self.collections[thing.slug] = thing

    def remove(self, id: str) -> None:
        """A repository that its owner deletes."""
        del self.repositories[id]

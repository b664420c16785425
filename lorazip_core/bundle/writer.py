"""A bundle, written: data first, ``manifest.json`` last."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import UNSET
from torch import Tensor

from ..base.digests import sha256_bytes
from ..base.errors import BundleDamaged, Unsupported, UsageError
from ..base.filesystem import link_or_copy, tree
from .kinds import MANIFEST_NAME
from .manifest import FileEntry, Manifest, encode_manifest, read_manifest
from .tensor_file import TensorFileWriter, TensorLayout, layout_of


class BundleWriter:
    """Writes the files of a bundle into a folder and keeps the list of them for the manifest.

    Several threads may add files. Whoever made the folder fsyncs it, all files together.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, FileEntry] = {}
        self._folders: set[str] = set()
        self._shared: dict[str, FileEntry] = {}

    @property
    def files(self) -> list[FileEntry]:
        """What was written so far, by path."""
        return [self._files[path] for path in sorted(self._files)]

    @contextmanager
    def tensors(
        self, path: str, layouts: Mapping[str, TensorLayout], *, basis_sha256: str | None = None
    ) -> Iterator[TensorFileWriter]:
        """A safetensors file to append tensors to; a file of cores names the digest of the basis that it belongs to."""
        metadata = {"basis_sha256": basis_sha256} if basis_sha256 else None
        with TensorFileWriter(self._target(path), layouts, metadata=metadata) as writer:
            yield writer
        self._add(FileEntry(path, writer.size_bytes, writer.sha256))

    def add_tensors(self, path: str, tensors: Mapping[str, Tensor], *, basis_sha256: str | None = None) -> FileEntry:
        """Write a safetensors file of tensors that are all there."""
        layouts = {name: layout_of(tensor) for name, tensor in tensors.items()}
        with self.tensors(path, layouts, basis_sha256=basis_sha256) as writer:
            for name in writer.order:
                writer.append(name, tensors[name])
        return self._files[path]

    def add_shared(self, path: str, tensors: Mapping[str, Tensor]) -> FileEntry:
        """Write a safetensors file, unless this has written one of the same bytes: then the entry of that one."""
        entry = self.add_tensors(path, tensors)
        first = self._shared.setdefault(entry.sha256, entry)
        if first is not entry:
            self._target(path).unlink()
            del self._files[path]
        return first

    def add_bytes(self, path: str, data: bytes) -> FileEntry:
        """Write a file byte for byte."""
        self._target(path).write_bytes(data)
        return self._add(FileEntry(path, len(data), sha256_bytes(data)))

    def add_shared_bytes(self, path: str, data: bytes) -> FileEntry:
        """Write a file byte for byte, unless this has written one of the same bytes: then the entry of that one."""
        first = self._shared.get(sha256_bytes(data))
        if first is None:
            first = self._shared.setdefault(sha256_bytes(data), self.add_bytes(path, data))
        return first

    def add_file(self, path: str, source: Path, sha256: str) -> FileEntry:
        """Take a finished file over, by a link if possible; ``sha256`` is its digest."""
        target = self._target(path)
        link_or_copy(source, target)
        return self._add(FileEntry(path, target.stat().st_size, sha256))

    def carry(self, bundle: Path, entry: FileEntry) -> None:
        """Take a file of another bundle over as it is, by a link if possible; `add_shared` and the like know it."""
        link_or_copy(bundle / entry.path, self._target(entry.path))
        self._shared.setdefault(entry.sha256, self._add(entry))

    def mark_as_rest(self, path: str, of: FileEntry) -> None:
        """Note that a file that was written has what is left of one of another bundle."""
        origin = of.sha256 if of.rest_of is UNSET else of.rest_of
        self._files[path] = msgspec.structs.replace(self._files[path], rest_of=origin)

    def digest(self, path: str) -> str:
        """The digest of a file that was written."""
        return self._files[path].sha256

    def free(self, path: str) -> str:
        """``path``, or if a file that was written has this name, the same with the next number behind it."""
        folder, _, name = path.rpartition("/")
        stem, point, ending = name.rpartition(".")
        found = re.fullmatch(r"(.*)-(\d{1,9})", stem)
        base, number = (found[1], int(found[2])) if found else (stem, 0)
        while path in self._files:
            number += 1
            path = f"{folder}/{base}-{number}{point}{ending}"
        return path

    def clear(self) -> None:
        """Remove all that was written."""
        for path in (*self._files, MANIFEST_NAME):
            (self._folder / path).unlink(missing_ok=True)
        self._files.clear()
        self._shared.clear()

    def finish(self, manifest: Manifest) -> int:
        """Write the manifest; with it the bundle is complete. Returns the bytes of all files."""
        data = encode_manifest(manifest)
        (self._folder / MANIFEST_NAME).write_bytes(data)
        return len(data) + sum(entry.size_bytes for entry in self._files.values())

    def _target(self, path: str) -> Path:
        target = self._folder / path
        if target.parent.name not in self._folders:
            target.parent.mkdir(exist_ok=True)
            self._folders.add(target.parent.name)
        return target

    def _add(self, entry: FileEntry) -> FileEntry:
        self._files[entry.path] = entry
        return entry


def not_of_bundle(folder: Path) -> str | None:
    """Why a directory may not be replaced as a bundle, in words; None for one that has nothing but its bundle.

    Files have to be listed in a manifest that is whole; whether they are sound does not matter, and empty folders
    hold nothing to lose.
    """
    try:
        manifest = read_manifest(folder, ())
    except (BundleDamaged, Unsupported, UsageError) as error:
        return error.message
    listed = {MANIFEST_NAME, *(entry.path for entry in manifest.files)}
    for path in tree(folder):
        if path not in listed and not path.endswith("/"):
            return f"{MANIFEST_NAME} does not list {path}"
    return None

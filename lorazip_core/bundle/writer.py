"""A bundle, written: data first, ``manifest.json`` last."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..files import settle, sha256_bytes, sha256_file, write_file
from .manifest import MANIFEST_NAME, FileEntry, Manifest, encode_manifest

_LAYOUT = {MANIFEST_NAME, "bases", "cores", "individual", "extras", "configs"}


class BundleWriter:
    """Writes the files of a bundle into a folder and keeps the list of them for the manifest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, FileEntry] = {}

    @property
    def files(self) -> list[FileEntry]:
        """What was written so far, by path."""
        return [self._files[path] for path in sorted(self._files)]

    def add_tensors(self, path: str, tensors: dict[str, Tensor], *, basis_sha256: str | None = None) -> FileEntry:
        """Write a safetensors file; a file of cores names the digest of the basis that it belongs to."""
        target = self._folder / path
        target.parent.mkdir(exist_ok=True)
        # One metadata key at most: safetensors writes two or more in an order that changes from run to run.
        metadata = {"basis_sha256": basis_sha256} if basis_sha256 else None
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, target, metadata=metadata)
        settle(target)
        return self._add(FileEntry(path, target.stat().st_size, sha256_file(target)))

    def add_bytes(self, path: str, data: bytes) -> FileEntry:
        """Write a file byte for byte."""
        write_file(self._folder / path, data)
        return self._add(FileEntry(path, len(data), sha256_bytes(data)))

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest; with it the bundle is complete."""
        write_file(self._folder / MANIFEST_NAME, encode_manifest(manifest))

    def _add(self, entry: FileEntry) -> FileEntry:
        self._files[entry.path] = entry
        return entry


def is_bundle(folder: Path) -> bool:
    """Whether a directory holds a manifest, and nothing that is not of a bundle: only such a one may be replaced."""
    names = {entry.name for entry in folder.iterdir()}
    return MANIFEST_NAME in names and names <= _LAYOUT

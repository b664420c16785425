"""Finished pieces of work, each a file that tells by its own name whether it is whole.

A piece is a safetensors file called ``NAME.SHA256``, written under a hidden name and then renamed. It is not fsynced:
one that a power failure tore does not have the digest that its name says, and is made again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from ..base.digests import sha256_file
from ..base.progress import Progress
from ..base.threads import in_order
from ..bundle.tensor_file import TensorFileReader, write_tensors

_NAME = re.compile(r"([a-z]+(?:-\d+)*)\.([0-9a-f]{64})")


class Pieces:
    """The pieces in a folder, by name.

    ``left`` are those that an earlier run has left, once they are checked.
    """

    def __init__(self, folder: Path) -> None:
        self.left: frozenset[str] = frozenset()
        self._folder = folder
        found = map(_NAME.fullmatch, os.listdir(folder))
        self._files = {match[1]: folder / match[0] for match in found if match}
        self._readers: dict[str, TensorFileReader] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def check(self) -> None:
        """Remove all that is not a whole piece. For what an earlier run left, before any of it is used."""
        named = set(self._files.values())
        for entry in self._folder.iterdir():
            if entry not in named:  # unfinished, or a second one of its name
                entry.unlink()
        with closing(in_order(_is_whole, self._files.values(), torch.device("cpu"))) as results:
            torn = [name for name, whole in zip(self._files, results, strict=True) if not whole]
        for name in torn:
            self._files.pop(name).unlink()
        self.left = frozenset(self._files)

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store a piece."""
        hidden = self._folder / f".{name}"
        written = write_tensors(hidden, tensors)
        self._files[name] = hidden.rename(self._folder / f"{name}.{written.sha256}")

    def read(self, name: str) -> TensorFileReader:
        """What is in a piece; its header is read once and kept."""
        if name not in self._readers:
            self._readers[name] = TensorFileReader(self._files[name])
        return self._readers[name]

    def load(self, name: str) -> dict[str, Tensor]:
        """All of a small piece."""
        reader = TensorFileReader(self._files[name])
        return reader.tensors(reader.layouts)

    def file(self, name: str) -> tuple[Path, str]:
        """Where a piece is, and its digest."""
        path = self._files[name]
        return path, path.suffix[1:]


def individual_piece(number: int, attempt: int) -> str:
    """The name of the piece with the tensors of adapter ``number``: its file in the bundle, if it has one alone."""
    return f"individual-{number}-{attempt}"


def note_left(pieces: Pieces, names: Sequence[str], progress: Progress) -> None:
    """Say how many of the pieces called ``names`` an interrupted run has left, if any."""
    left = sum(name in pieces.left for name in names)
    if left:
        progress.note(f"going on from {left} of {len(names)} pieces of an interrupted run")


def _is_whole(path: Path) -> bool:
    return path.is_file() and sha256_file(path) == path.suffix[1:]

"""Files in which several adapters are packed: made from the pieces of each, and pieces themselves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.stopping import check_stop
from ..base.threads import in_order
from ..schemes.registry import packed_scheme
from ..schemes.scheme import PackedScheme
from .individual import individual_piece
from .pieces import Pieces

PACKED_ADAPTERS = 32
"""In one file: enough to share tables of codes, and few enough that unpacking all for one of them takes no time."""

_CPU = torch.device("cpu")


class PackedFile(NamedTuple):
    """Adapters that are packed together, by their numbers, ascending."""

    path: str
    """In the bundle."""
    piece: str
    scheme: PackedScheme
    adapters: list[int]


def packed_files(schemes: Mapping[int, str], attempt: int) -> list[PackedFile]:
    """The files for adapters that are kept on their own, by number in which scheme."""
    members: defaultdict[str, list[int]] = defaultdict(list)
    for number, name in sorted(schemes.items()):
        if packed_scheme(name):
            members[name].append(number)
    files: list[PackedFile] = []
    for name, numbers in members.items():
        scheme = packed_scheme(name)
        assert scheme is not None
        for start in range(0, len(numbers), PACKED_ADAPTERS):
            place = start // PACKED_ADAPTERS
            path = f"individual/{name}-{place}.safetensors"
            piece = f"packed-{len(files)}-{attempt}"
            files.append(PackedFile(path, piece, scheme, numbers[start : start + PACKED_ADAPTERS]))
    return files


def pack(files: list[PackedFile], attempt: int, modules: list[str], has: Tensor, pieces: Pieces) -> None:
    """Make the pieces that are ``files``. ``has`` [n, M] says which adapter has which of the ``modules``."""

    def one(file: PackedFile) -> None:
        check_stop()
        if file.piece in pieces:
            return
        adapters = []
        for number in file.adapters:
            reader = pieces.read(individual_piece(number, attempt))
            names = [modules[module] for module in has[number].nonzero()[:, 0].tolist()]
            adapters.append(
                [{suffix: reader.tensor(f"{name}.{suffix}") for suffix in file.scheme.own} for name in names]
            )
        pieces.write(file.piece, file.scheme.pack(adapters))

    with closing(in_order(one, files, _CPU)) as done:
        for _ in done:
            pass

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
from ..bundle.size import PACKED_ADAPTERS
from ..schemes.joined import Joined
from ..schemes.registry import packed_scheme
from ..schemes.scheme import PackedScheme
from .pieces import Pieces, individual_piece

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


def joined(scheme: PackedScheme, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors, by module and suffix, as few large ones: a piece of hundreds of small ones takes long.

    Of every suffix, all modules in the order of their names, flat, and their shapes [modules, dimensions].
    """
    modules = sorted({name.removesuffix(f".{scheme.own[0]}") for name in tensors if name.endswith(f".{scheme.own[0]}")})
    few = {}
    for suffix in scheme.own:
        own = Joined.of([tensors[f"{module}.{suffix}"] for module in modules])
        few[suffix], few[f"{suffix}.shapes"] = own.flat, torch.from_numpy(own.shapes)
    return few


def _apart(scheme: PackedScheme, few: Mapping[str, Tensor]) -> dict[str, Joined]:
    """What was `joined`, by suffix."""
    return {suffix: Joined(few[suffix], few[f"{suffix}.shapes"].numpy()) for suffix in scheme.own}


def pack(files: list[PackedFile], attempt: int, pieces: Pieces) -> None:
    """Make the pieces that are ``files``."""

    def one(file: PackedFile) -> None:
        check_stop()
        if file.piece not in pieces:
            own = (pieces.load(individual_piece(number, attempt)) for number in file.adapters)
            pieces.write(file.piece, file.scheme.pack([_apart(file.scheme, few) for few in own]))

    with closing(in_order(one, files, _CPU)) as done:
        for _ in done:
            pass

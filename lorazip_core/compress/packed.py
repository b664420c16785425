"""Files in which several adapters are packed: made from the pieces of each, and pieces themselves."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.stopping import check_stop
from ..base.threads import in_order
from ..bundle.size import PACKED_ADAPTERS, PACKED_MODULES
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


def packed_files(kept: Mapping[int, tuple[str, int]], attempt: int) -> list[PackedFile]:
    """The files for adapters that are kept on their own: by number in which scheme, and how many modules they have."""
    members: defaultdict[str, list[list[int]]] = defaultdict(list)
    modules = 0
    for number, (name, own) in sorted(kept.items(), key=lambda each: (each[1][0], each[0])):
        if not packed_scheme(name):
            continue
        of_files = members[name]
        if not of_files or len(of_files[-1]) == PACKED_ADAPTERS or modules + own > PACKED_MODULES:
            of_files.append([])
            modules = 0
        of_files[-1].append(number)
        modules += own
    files: list[PackedFile] = []
    for name, of_files in members.items():
        scheme = packed_scheme(name)
        assert scheme is not None
        for place, numbers in enumerate(of_files):
            path, piece = f"individual/{name}-{place}.safetensors", f"packed-{len(files)}-{attempt}"
            files.append(PackedFile(path, piece, scheme, numbers))
    return files


def joined(scheme: PackedScheme, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors, by module and suffix, as few large ones: a piece of hundreds of small ones takes long.

    Of every suffix, all modules in the order of their names, flat, and their shapes [modules, dimensions].
    """
    modules = sorted({name.removesuffix(f".{scheme.own[0]}") for name in tensors if name.endswith(f".{scheme.own[0]}")})
    few = {}
    for suffix in scheme.own:
        own = [tensors[f"{module}.{suffix}"] for module in modules]
        few[suffix] = torch.cat([tensor.reshape(-1) for tensor in own])
        few[f"{suffix}.shapes"] = torch.tensor([tensor.shape for tensor in own], dtype=torch.int64)
    return few


def _apart(scheme: PackedScheme, few: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """What was `joined`, module by module."""
    own: dict[str, list[Tensor]] = {}
    for suffix in scheme.own:
        shapes = few[f"{suffix}.shapes"].tolist()
        flat = torch.split(few[suffix], [math.prod(shape) for shape in shapes])
        own[suffix] = [tensor.reshape(shape) for tensor, shape in zip(flat, shapes, strict=True)]
    return [dict(zip(own, tensors, strict=True)) for tensors in zip(*own.values(), strict=True)]


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

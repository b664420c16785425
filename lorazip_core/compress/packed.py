"""Files in which several adapters are packed: made from the pieces of each, and pieces themselves."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.stopping import check_stop
from ..base.threads import in_order
from ..bundle.size import PACKED_ADAPTERS, PACKED_MODULES
from ..schemes.joined import Joined
from ..schemes.registry import SCHEMES, packed_scheme
from ..schemes.scheme import PackedScheme
from .pieces import Pieces, individual_piece

_CPU = torch.device("cpu")
_PACKERS = 8  # each has the codes of several adapters in memory


class PackedFile(NamedTuple):
    """Adapters that are packed together, by their numbers, ascending."""

    path: str
    """In the bundle."""
    piece: str
    scheme: PackedScheme
    adapters: list[int]


def packed_files(kept: Iterable[tuple[int, str, int]], attempt: int) -> Iterator[PackedFile]:
    """The files for adapters that are kept on their own, by ascending number, in which scheme, with so many modules.

    Each comes as soon as all of its adapters are known.
    """
    members: defaultdict[str, list[int]] = defaultdict(list)
    modules: Counter[str] = Counter()
    begun: Counter[str] = Counter()

    def file(name: str) -> PackedFile:
        scheme = packed_scheme(name)
        assert scheme is not None
        place, begun[name], modules[name] = begun[name], begun[name] + 1, 0
        piece = f"packed-{list(SCHEMES).index(name)}-{place}-{attempt}"
        return PackedFile(f"individual/{name}-{place}.safetensors", piece, scheme, members.pop(name))

    for number, name, own in kept:
        if packed_scheme(name):
            if members[name] and modules[name] + own > PACKED_MODULES:
                yield file(name)
            members[name].append(number)
            modules[name] += own
            if len(members[name]) == PACKED_ADAPTERS:
                yield file(name)
    yield from map(file, [name for name, numbers in members.items() if numbers])


def joined(own: Mapping[str, Joined]) -> dict[str, Tensor]:
    """What an adapter has in a scheme that packs it, as the tensors of a piece."""
    few = {}
    for suffix, tensors in own.items():
        few[suffix], few[f"{suffix}.shapes"] = tensors.flat, torch.from_numpy(tensors.shapes)
    return few


def _apart(scheme: PackedScheme, few: Mapping[str, Tensor]) -> dict[str, Joined]:
    """What was `joined`, by suffix."""
    return {suffix: Joined(few[suffix], few[f"{suffix}.shapes"].numpy()) for suffix in scheme.own}


def pack(files: Iterable[PackedFile], attempt: int, pieces: Pieces) -> list[PackedFile]:
    """Make the pieces that are ``files``, each while those after it are still to come; returns the files."""

    def one(file: PackedFile) -> PackedFile:
        check_stop()
        if file.piece not in pieces:
            own = (pieces.load(individual_piece(number, attempt)) for number in file.adapters)
            pieces.write(file.piece, file.scheme.pack([_apart(file.scheme, few) for few in own]))
        return file

    with closing(in_order(one, files, _CPU, workers=_PACKERS)) as done:
        return list(done)

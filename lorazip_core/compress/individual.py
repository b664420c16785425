"""Adapters on their own: each in the scheme that was asked for, or in the first one that serves it well enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.stopping import check_stop
from ..bundle.summary import is_adapter_within
from ..schemes.registry import EXACT, FALLBACKS, individual_scheme
from ..schemes.scheme import Encoding, ModuleGroup, Ranks, Target
from .packed import joined
from .pieces import Pieces, individual_piece

# Beside an adapter's own tensors, if they are in one piece: no suffix has a point.
_SCHEME, _RANK, _ASKED, _ERRORS = "kept.scheme", "kept.rank", "kept.as_asked", "kept.squared_errors"


class Kept(NamedTuple):
    """How an adapter is kept on its own, and ‖ΔW−ΔŴ‖² of its modules [M_i] in the order of their names, in float64."""

    scheme: str
    rank: int | None
    """The largest of any module; None for a scheme whose adapters have none."""
    as_asked: bool
    """Whether it is kept as it was asked for; else it would have exceeded a limit, or the dtype could not hold it."""
    squared_errors: Tensor


class Individual(NamedTuple):
    """An adapter as it is stored."""

    scheme: str
    as_asked: bool
    encoding: Encoding

    def store(self, number: int, attempt: int, pieces: Pieces) -> Kept:
        """Store adapter ``number``, in as few pieces as can be: each is a file.

        What `stored` tells of it is with its tensors if these are to be packed, else in a piece of its own, before the
        one that is its file as the bundle has it.
        """
        errors = self.encoding.squared_errors
        kept = Kept(
            self.scheme,
            _largest(self.encoding.ranks),
            self.as_asked,
            torch.tensor([errors[name] for name in sorted(errors)], dtype=torch.float64),
        )
        told = {
            _SCHEME: torch.tensor(list(kept.scheme.encode()), dtype=torch.uint8),
            _RANK: torch.tensor(-1 if kept.rank is None else kept.rank, dtype=torch.int64),
            _ASKED: torch.tensor(kept.as_asked),
            _ERRORS: kept.squared_errors,
        }
        tensors = self.encoding.tensors
        if self.encoding.joined is not None:
            tensors = joined(self.encoding.joined) | told
        else:
            pieces.write(_kept_piece(number, attempt), told)
        pieces.write(individual_piece(number, attempt), tensors)
        return kept


def _kept_piece(number: int, attempt: int) -> str:
    return f"kept-{number}-{attempt}"


def stored(number: int, attempt: int, pieces: Pieces) -> Kept | None:
    """How adapter ``number`` was stored, or None if it is not there yet."""
    own, name = individual_piece(number, attempt), _kept_piece(number, attempt)
    if own not in pieces:
        return None
    piece = pieces.read(name if name in pieces else own)
    if _SCHEME not in piece.layouts:
        return None  # it is the file of an adapter of which nothing is told any more
    told = piece.tensors([_SCHEME, _RANK, _ASKED, _ERRORS])
    rank = int(told[_RANK])
    scheme = bytes(told[_SCHEME].tolist()).decode()
    return Kept(scheme, None if rank < 0 else rank, bool(told[_ASKED]), told[_ERRORS])


def keep_individually(
    groups: Sequence[ModuleGroup],
    method: str | None,
    target: Target,
    max_error: float | None,
    *,
    squared_norm: float,
    dtype: torch.dtype,
) -> Individual:
    """Keep an adapter as ``method`` does for ``target``, or else by the first fallback that meets ``max_error``.

    Without a method, only fallbacks are tried. Without a limit, what matters is that ``dtype`` can hold the adapter.
    """
    least = Target(limit=None if max_error is None else max_error * squared_norm)
    for name in dict.fromkeys([*([method] if method else []), *FALLBACKS]):
        scheme = individual_scheme(name)
        for tried, encoding in enumerate(scheme.encodings(groups, target if name == method else least, dtype)):
            check_stop()
            as_asked = name == method and (tried == 0 or target.rank is None)
            if name == EXACT or is_adapter_within(encoding.squared_errors.values(), [squared_norm], max_error):
                return Individual(name, as_asked, encoding)
    raise AssertionError("the last fallback loses nothing")


def keep_exactly(groups: Sequence[ModuleGroup], dtype: torch.dtype) -> Individual:
    """Keep an adapter without any loss."""
    [encoding] = individual_scheme(EXACT).encodings(groups, Target(), dtype)
    return Individual(EXACT, False, encoding)


def _largest(ranks: Ranks) -> int | None:
    return None if ranks is None else max(ranks.values())

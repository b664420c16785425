"""y += ΔŴ x for a batch that mixes adapters, as operators of torch, which a compiled model calls as they are.

On a GPU they are the kernels of `kernels`; elsewhere, and as what these are tested against, they are a few lines here:
no faster than they look, and always right. Both sum in float32 and round once, to the dtype of y.

``batch`` is the array of `tiles.batch`, ``kind`` the number of the kind in it, ``groups`` how many groups of tokens of
this kind there can be, ``columns`` and ``widths`` where the slices of y begin and how wide they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tiles import FIELDS, HEAD
from .vectors import unpack

_LIBRARY = torch.library.Library("lorazip", "DEF")
_LIBRARY.define(
    "add_terms(Tensor(a!) y, Tensor x, Tensor batch, Tensor index, Tensor at, Tensor forms, Tensor scale, Tensor data, "
    "int kind, int groups, int most, int[] columns, int[] widths, int[] out_starts, int in_start) -> ()"
)
_LIBRARY.define(
    "add_cores(Tensor(a!) y, Tensor x, Tensor batch, Tensor u, Tensor v, Tensor core, "
    "int kind, int groups, int[] columns, int[] widths) -> ()"
)


def _add_terms(
    y: Tensor,
    x: Tensor,
    batch: Tensor,
    index: Tensor,
    at: Tensor,
    forms: Tensor,
    scale: Tensor,
    data: Tensor,
    kind: int,
    groups: int,
    most: int,
    columns: list[int],
    widths: list[int],
    out_starts: list[int],
    in_start: int,
) -> None:
    """``index`` [slices, rows, 2] is that of the layer; of û and v̂ only those elements are read that x and y have."""
    for tokens, row, _ in _tiles(batch, kind):
        for slice_, (column, width, out) in enumerate(zip(columns, widths, out_starts, strict=True)):
            first, count = index[slice_, row].tolist()
            added = torch.zeros(len(tokens), width, device=y.device)
            for term in range(first, first + count):
                (u_at, v_at), (u_form, v_form) = at[term].tolist(), forms[term].tolist()
                u = unpack(data, u_at, u_form, out + width)[out:]
                v = unpack(data, v_at, v_form, in_start + x.shape[1])[in_start:]
                added += torch.outer(x[tokens].float() @ v * scale[term], u)
            target = y[tokens, column : column + width]
            y[tokens, column : column + width] = (target.float() + added).to(y.dtype)


def _add_cores(
    y: Tensor,
    x: Tensor,
    batch: Tensor,
    u: Tensor,
    v: Tensor,
    core: Tensor,
    kind: int,
    groups: int,
    columns: list[int],
    widths: list[int],
) -> None:
    """See `cores.CoreTable` for ``u``, ``v`` and ``core``."""
    for tokens, cluster, places in _tiles(batch, kind):
        first = 0
        for slice_, (column, width) in enumerate(zip(columns, widths, strict=True)):
            inner = x[tokens].float() @ v[cluster, slice_].float().mT
            own = core[slice_, places].float()
            inner = inner * own if own.ndim == 2 else (inner.unsqueeze(1) @ own).squeeze(1)
            added = inner @ u[cluster, first : first + width].float().mT
            target = y[tokens, column : column + width]
            y[tokens, column : column + width] = (target.float() + added).to(y.dtype)
            first += width


def _tiles(batch: Tensor, kind: int) -> list[tuple[Tensor, int, Tensor]]:
    """The tokens, the group and the adapters of every tile."""
    count, tiles, tokens, adapters = batch[HEAD * kind : HEAD * (kind + 1)].tolist()
    found = []
    for first, places, group in batch[tiles : tiles + FIELDS * count].reshape(-1, FIELDS).tolist():
        own = slice(first, first + places)
        found.append((batch[tokens:][own].long(), group, batch[adapters:][own].long()))
    return found


def _nothing(*_: object) -> None:
    """What a compiler needs to know: y keeps its shape."""


_LIBRARY.impl("add_terms", _add_terms, "CPU")
_LIBRARY.impl("add_cores", _add_cores, "CPU")
torch.library.register_fake("lorazip::add_terms", _nothing, lib=_LIBRARY)
torch.library.register_fake("lorazip::add_cores", _nothing, lib=_LIBRARY)


def _on_gpu(name: str) -> None:
    """The kernels are compiled for a GPU, by Triton, when they are first called."""

    def call(*arguments: object) -> None:
        from . import kernels

        getattr(kernels, name)(*arguments)

    _LIBRARY.impl(name, call, "CUDA")


_on_gpu("add_terms")
_on_gpu("add_cores")

"""The first pass over a collection: every file read once, for its digest and for the energy of every update."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapter.collection import Collection
from ..adapter.layout import Layout
from ..adapter.reader import Adapter
from ..base.errors import AdapterError
from ..base.progress import Advance
from ..base.stopping import check_stop
from ..bundle.manifest import SourceEntry
from .blocks import Block, Contents, in_blocks
from .groups import Integers, by_layout
from .norms import check, finite_extras, norms_of_adapter, norms_of_rows, tensors_of
from .placement import Placement

Verify = Callable[[Adapter, list[SourceEntry]], None]


@dataclass(frozen=True)
class FirstPass:
    """What is known of n adapters when all their bytes have been read once.

    ``norms`` [n, M] holds ‖ΔW_im‖² in float64; adapters in ``errors``, by number, cannot be used. ``resident`` has for
    every layout the data [n_l, size] of its adapters on the device, in their order; None if they did not stay.
    """

    norms: Tensor
    files: list[list[SourceEntry]]
    errors: dict[int, AdapterError] = field(default_factory=dict)
    resident: dict[Layout, Tensor] | None = None
    singular: dict[int, Tensor] | None = None
    """If wanted, the singular values of every adapter [Σ r] in float64: of its modules, in order, one after another."""


def read_all(
    collection: Collection,
    device: torch.device,
    placement: Placement,
    verify: Verify,
    advance: Advance,
    *,
    singular: bool = False,
) -> FirstPass:
    """Read all files of a collection. ``verify`` sees the digests of an adapter first and may refuse it.

    ``advance`` is called with 1 for each adapter, by this thread. Adapters with NaN or Inf, or whose files were cut
    short, are errors.
    """
    adapters = collection.adapters
    norms = torch.zeros(len(adapters), len(collection.modules), dtype=torch.float64)
    resident: dict[Layout, Tensor] | None = {} if placement.kind == "resident" else None
    found = FirstPass(norms, [[] for _ in adapters], {}, resident, {} if singular else None)

    def examined(block: Block) -> _Examined:
        own = [adapters[number] for number in block.adapters]
        files = [_verified(adapter, each, verify) for adapter, each in zip(own, block.files, strict=True)]
        examine = _examined_on_host if placement.kind == "host" else _examined_on_device
        values = None
        if singular:
            values = torch.zeros(len(own), sum(part.rank for part in block.group.parts), dtype=torch.float64)
        return _Examined(
            block.adapters, block.group.modules, *examine(block._replace(files=files), own, values), values
        )

    groups = by_layout(adapters, collection.modules)
    with closing(in_blocks(examined, adapters, groups, device, placement, advance, found.resident)) as results:
        for numbers, modules, squared_norms, files, values in results:
            norms[torch.tensor(numbers)[:, None], torch.from_numpy(modules)] = squared_norms
            if found.singular is not None and values is not None:
                found.singular.update(zip(numbers, values, strict=True))
            for number, each in zip(numbers, files, strict=True):
                if isinstance(each, AdapterError):
                    found.errors[number] = each
                else:
                    found.files[number] = each
    return found


class _Examined(NamedTuple):
    """The k adapters and p modules of a block, by number; ‖ΔW‖² [k, p]; and the files of each adapter, or why it cannot
    be used."""

    adapters: list[int]
    modules: Integers
    norms: Tensor
    files: list[Contents]
    singular: Tensor | None
    """[k, Σ r], if wanted."""


def _verified(adapter: Adapter, files: Contents, verify: Verify) -> Contents:
    if not isinstance(files, AdapterError):
        try:
            verify(adapter, files)
        except AdapterError as error:
            return error
    return files


def _examined_on_host(block: Block, adapters: list[Adapter], singular: Tensor | None) -> tuple[Tensor, list[Contents]]:
    """One adapter after another. One that is too large for memory has its tensors read a second time."""
    norms = torch.zeros(len(adapters), len(block.group.parts), dtype=torch.float64)
    files = list(block.files)
    for row, adapter in enumerate(adapters):
        check_stop()
        if not isinstance(files[row], AdapterError):
            try:
                tensor_of = adapter.tensor if block.data is None else tensors_of(adapter, block.data[row])
                found = norms_of_adapter(
                    adapter.parts,
                    block.stored(slice(row, row + 1), [adapter]),
                    None if singular is None else singular[row],
                )
                check(adapter, found, tensor_of)
                norms[row] = torch.tensor(found, dtype=torch.float64)
            except AdapterError as error:
                files[row] = error
    return norms, files


def _examined_on_device(
    block: Block, adapters: list[Adapter], singular: Tensor | None
) -> tuple[Tensor, list[Contents]]:
    """All adapters at once; what is wrong with one is found out on its own."""
    assert block.data is not None
    there = None if singular is None else torch.zeros_like(singular, device=block.data.device)
    norms = norms_of_rows(block.data, block.group, block.rows, there).cpu()
    if singular is not None and there is not None:
        singular.copy_(there)
    finite = finite_extras(block.data, block.group, list(adapters[0].extras))
    sound = (finite.cpu() & norms.isfinite().all(1)).tolist()
    files = list(block.files)
    for row, adapter in enumerate(adapters):
        if not isinstance(files[row], AdapterError) and not sound[row]:
            try:
                check(adapter, norms[row].tolist(), tensors_of(adapter, block.data[row]))
            except AdapterError as error:
                files[row] = error
    return norms, files

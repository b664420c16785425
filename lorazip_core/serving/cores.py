"""Adapters that share bases, on a device, as kernels read them: y += U_c Σ_i (V_cᵀ x), where c is the cluster of i.

A layer of the engine holds several modules side by side (q, k and v in one matrix), its slices s. Ranks are padded with
zeros to R, the power of two that holds the largest, so that one kernel does all clusters:

- ``u`` [clusters, Σ d_out, R] and ``v`` [clusters, slices, R, d_in], in the dtype of the engine;
- ``core`` [slices, places, R, R]: Σᵀ, the first R being that of V and the second that of U; or, where cores are
  diagonal, [slices, places, R].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..base.errors import LocalError
from .layers import Layer
from .spans import Spans

LEAST = 16
"""The fewest rows and columns that tensor cores multiply."""
TILE = LEAST
"""The most tokens that a kernel works on together in a batch of few."""


class CoreTable:
    """The bases of all clusters and the cores of all adapters, by place, for every layer."""

    tile = TILE

    def __init__(
        self,
        layers: Sequence[Layer],
        bases: Mapping[int, Mapping[str, Mapping[str, Tensor]]],
        places: int,
        *,
        diagonal: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """``bases``: by cluster and module, what its adapters share."""
        widths = [basis[suffix].shape[1] for of in bases.values() for basis in of.values() for suffix in ("U", "V")]
        self.rank = 1 << (max(LEAST, *widths) - 1).bit_length()
        self.diagonal = diagonal
        self.clusters = {cluster: number for number, cluster in enumerate(bases)}
        self.places = places
        self._free = Spans(places)
        self._slices = {
            each.module: (number, slice_)
            for number, layer in enumerate(layers)
            for slice_, each in enumerate(layer.slices)
        }
        shape = (places, self.rank) if diagonal else (places, self.rank, self.rank)
        self.u: list[Tensor] = []
        self.v: list[Tensor] = []
        self.core: list[Tensor] = []
        for layer in layers:
            wide = sum(len(each.out) for each in layer.slices)
            u = torch.zeros(len(bases), wide, self.rank, dtype=dtype, device=device)
            v = torch.zeros(
                len(bases), len(layer.slices), self.rank, len(layer.slices[0].taken), dtype=dtype, device=device
            )
            for number, of in enumerate(bases.values()):
                column = 0
                for slice_, each in enumerate(layer.slices):
                    if (basis := of.get(each.module)) is not None:
                        own_u = basis["U"][each.out.start : each.out.stop]
                        own_v = basis["V"][each.taken.start : each.taken.stop].mT
                        u[number, column : column + len(own_u), : own_u.shape[1]] = own_u.to(device, dtype)
                        v[number, slice_, : len(own_v)] = own_v.to(device, dtype)
                    column += len(each.out)
            self.u.append(u)
            self.v.append(v)
            self.core.append(torch.zeros(len(layer.slices), *shape, dtype=dtype, device=device))

    def add(self, cores: Mapping[str, Tensor]) -> int:
        """Put an adapter with these cores, by module, into a free place, which is returned."""
        place = self.take()
        for held in self.core:
            held[:, place] = 0
        for module, core in cores.items():
            self.fill(module, [place], core[None])
        return place

    def fill(self, module: str, places: Sequence[int], cores: Tensor) -> None:
        """Put the cores [n, …] of a module into places that hold zeros. A module of no layer is left out."""
        if module not in self._slices:
            return
        layer, slice_ = self._slices[module]
        held = self.core[layer][slice_]
        cores = cores.to(held.device, held.dtype)
        cores = cores.mT if cores.ndim > 2 else cores
        filled = held[(slice(None), *map(slice, cores.shape[1:]))]
        filled[torch.tensor(places, device=held.device)] = cores

    def take(self) -> int:
        """A free place."""
        place = self._free.take(1)
        if place is None:
            raise LocalError("no room for an adapter more", "remove others, or start the server with more room")
        return place

    def remove(self, place: int) -> None:
        """Free a place."""
        self._free.give(place, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (*self.u, *self.v, *self.core))

"""Tensors of many modules as one: hundreds of small ones take long to store, to read and to pass on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Joined:
    """Tensors of one dtype and equally many dimensions, one after another."""

    flat: Tensor
    """[elements]: those of all tensors, each in C order."""
    shapes: NDArray[np.int64]
    """[tensors, dimensions]"""

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Joined:
        """Join tensors, of which there is one at least."""
        shapes = np.array([tensor.shape for tensor in tensors], np.int64).reshape(len(tensors), -1)
        return cls(torch.cat([tensor.reshape(-1) for tensor in tensors]), shapes)

    def __getitem__(self, place: int) -> Tensor:
        """One of the tensors; a view."""
        return self.pieces[place].view(self.shapes[place].tolist())

    def __iter__(self) -> Iterator[Tensor]:
        """All tensors in order, as `__getitem__` has them, but sooner than one by one."""
        for piece, shape in zip(self.pieces, self.shapes.tolist(), strict=True):
            yield piece.view(shape)

    @cached_property
    def pieces(self) -> Sequence[Tensor]:
        """The elements of every tensor; views."""
        return self.flat.split_with_sizes(self.shapes.prod(1).tolist())

    @cached_property
    def memory(self) -> memoryview:
        """The bytes of all tensors, which are on the CPU."""
        flat = self.flat.as_strided(self.flat.shape, (1,))  # of no or one element, a stride may be anything
        return flat.view(torch.uint8).numpy().data

    @cached_property
    def begins(self) -> list[int]:
        """Where every tensor begins in `memory`, and where the last one ends."""
        return [0, *np.cumsum(self.shapes.prod(1) * self.flat.itemsize).tolist()]

"""What the launches of both kinds of kernels have in common."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

_Key = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, torch.device]
_known: dict[_Key, Tensor] = {}


def precision(y: Tensor) -> str:
    """Of products of float32: all of it where the engine is in float32, else that of 11 bits, which bf16 has not."""
    return "ieee" if y.dtype == torch.float32 else "tf32"


def aligned(y: Tensor, columns: list[int], widths: list[int], size: int) -> int:
    """What divides the first column and the width of every block, and a row: then several elements are read at once."""
    return gcd(16, y.stride(0), size, *columns, *widths)


def blocks_of(
    columns: tuple[int, ...], widths: tuple[int, ...], starts: tuple[int, ...], size: int, device: torch.device
) -> Tensor:
    """[n, 4]: of every block of columns of y, its slice, its first row of û or U, its first column and its width."""
    key = columns, widths, starts, size, device
    if key not in _known:
        found = [
            (slice_, start + left, column + left, min(size, width - left))
            for slice_, (column, width, start) in enumerate(zip(columns, widths, starts, strict=True))
            for left in range(0, width, size)
        ]
        _known[key] = torch.tensor(found, dtype=torch.int32, device=device)
    return _known[key]

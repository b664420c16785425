"""PEFT's ``lora_bias``: B has a bias, to which the scale of its module applies as it does to B.

A bundle has it with the scale folded in, as an extra.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..module import Part
from .names import PREFIX

_BIAS = ".lora_B.bias"


def biased_module(key: str) -> str | None:
    """The module that a tensor of this name is the bias of; None for any other name."""
    return key.removeprefix(PREFIX).removesuffix(_BIAS) if key.endswith(_BIAS) else None


def folded(key: str, tensor: Tensor, parts: Mapping[str, Part]) -> Tensor:
    """An extra with its scale. A bias is of its own dtype where that holds the products exactly.

    Else it is of F32, or F64 where it is F32 itself. Any other tensor stays as it is.
    """
    module = biased_module(key)
    if module is None:
        return tensor
    scaled = tensor.double() * parts[module].scale
    if torch.equal(scaled.to(tensor.dtype).double(), scaled):
        return scaled.to(tensor.dtype)
    return scaled.to(torch.float32 if tensor.dtype.itemsize < 4 else torch.float64)


def unfolded(bias: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """A bias without the scale, which PEFT multiplies in again: in ``dtype`` where that holds it, as it mostly does."""
    exact = bias.double() / scale
    own = exact.to(dtype)
    return own if torch.allclose(own.double(), exact, rtol=1e-6, atol=0) else exact.to(torch.float32)

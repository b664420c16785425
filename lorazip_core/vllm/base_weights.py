"""The weights of a base model in a directory, from the headers of their safetensors files: nothing else is read."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from ..base.errors import UsageError
from ..base.filesystem import naming
from ..base.safetensors_header import TORCH_DTYPES, HeaderTensor, parse_header, read_header
from ..bundle.manifest import ModuleEntry

# Weights of these dtypes have the shape of their matrix; packed ones (GPTQ, AWQ, 4 bits) have others.
_UNPACKED = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")


def read_weights(model: Path) -> dict[str, HeaderTensor]:
    """All tensors of the model in the directory, by name; empty without safetensors files.

    Raises UsageError for a file that is none.
    """
    found: dict[str, HeaderTensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        if path.name.startswith("consolidated"):  # the same weights once more, as Mistral publishes them
            continue
        not_one = UsageError(f"{path} is no safetensors file", "name another «model»")
        if not path.is_file():
            raise not_one
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with naming(path):
                found |= parse_header(read_header(descriptor))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise not_one from None
        finally:
            os.close(descriptor)
    return found


def nbytes(weights: dict[str, HeaderTensor]) -> int:
    """Bytes of all tensors as they are stored; those of dtypes that torch lacks count a byte for each element."""
    return sum(
        math.prod(tensor.shape) * (TORCH_DTYPES[tensor.dtype].itemsize if tensor.dtype in TORCH_DTYPES else 1)
        for tensor in weights.values()
    )


def mismatch(weights: dict[str, HeaderTensor], modules: Sequence[ModuleEntry]) -> str | None:
    """The first linear module whose weight in the model has another shape, in words, or None.

    Modules pass whose weights are packed, or not there under their name: a checkpoint may have other names for them.
    """
    for module in modules:
        weight = weights.get(f"{module.name}.weight")
        if module.kind != "linear" or weight is None or weight.dtype not in _UNPACKED:
            continue
        here, shape = (module.d_out, module.d_in), weight.shape
        if here not in (shape, shape[::-1]):  # GPT-2 stores them transposed
            return (
                f"{module.name} is {here[0]} x {here[1]} in the bundle and {' x '.join(map(str, shape))} in the model"
            )
    return None

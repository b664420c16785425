"""The header of a safetensors file, and the dtypes of the format."""

from __future__ import annotations

import json
import os
from typing import NamedTuple

import torch

# Those that torch has, with at least a byte for each element (F4 and F6 have less), in the order in which safetensors
# puts the tensors into a file, from the last to the first.
_NAMES_IN_TORCH = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",  # since torch 2.7
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
TORCH_DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _NAMES_IN_TORCH.items() if hasattr(torch, name)
}
SAFETENSORS_DTYPES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
_FIRST_READ = 2**15  # bytes; the header of 192 tensors takes about 20 KiB


class HeaderTensor(NamedTuple):
    """What the header of a file says of a tensor; ``begin`` counts from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int


def read_header(descriptor: int, likely_size: int = _FIRST_READ) -> bytes:
    """The header of an open file, with its length in the first 8 bytes; cut short where the file is.

    One read is enough if it has at most ``likely_size`` bytes.
    """
    data = os.pread(descriptor, max(likely_size, _FIRST_READ), 0)
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < end <= os.fstat(descriptor).st_size:
        data += os.pread(descriptor, end - len(data), len(data))
    return data[:end]


def parse_header(header: bytes) -> dict[str, HeaderTensor]:
    """The tensors of a header that `read_header` has read, by name. Raises ValueError for what is no JSON."""
    fields = json.loads(header[8:])
    fields.pop("__metadata__", None)
    return {
        name: HeaderTensor(entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][0])
        for name, entry in fields.items()
    }

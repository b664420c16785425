"""The shared-basis bundle, format 1: what docs/format.md specifies, written and read."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .manifest import (
    FORMAT_VERSION,
    AdapterEntry,
    ClusterEntry,
    Dtype,
    FileEntry,
    Manifest,
    Method,
    ModuleEntry,
    ModuleError,
    ParameterEntry,
    Parameters,
    ShardEntry,
    SkippedEntry,
    SourceEntry,
    Weights,
    required_to_read,
)
from .reader import Bundle

if TYPE_CHECKING:
    from .tensor_file import DTYPES, TensorFileReader, TensorFileWriter, TensorLayout, write_tensors
    from .writer import BundleWriter, not_of_bundle

__all__ = [
    "DTYPES",
    "FORMAT_VERSION",
    "AdapterEntry",
    "Bundle",
    "BundleWriter",
    "ClusterEntry",
    "Dtype",
    "FileEntry",
    "Manifest",
    "Method",
    "ModuleEntry",
    "ModuleError",
    "ParameterEntry",
    "Parameters",
    "ShardEntry",
    "SkippedEntry",
    "SourceEntry",
    "TensorFileReader",
    "TensorFileWriter",
    "TensorLayout",
    "Weights",
    "not_of_bundle",
    "required_to_read",
    "write_tensors",
]


# Importing torch takes seconds, and a manifest is read without it: these are imported when they are asked for.
_WITH_TORCH = {
    "BundleWriter": ".writer",
    "DTYPES": ".tensor_file",
    "TensorFileReader": ".tensor_file",
    "TensorFileWriter": ".tensor_file",
    "TensorLayout": ".tensor_file",
    "not_of_bundle": ".writer",
    "write_tensors": ".tensor_file",
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WITH_TORCH[name], __name__), name)

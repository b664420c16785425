"""The shared-basis bundle, format 1: what docs/format.md specifies, written and read."""

from .manifest import (
    DTYPES,
    FORMAT_VERSION,
    AdapterEntry,
    ClusterEntry,
    Dtype,
    FileEntry,
    Manifest,
    Method,
    ModuleEntry,
    ModuleError,
    Parameters,
    ShardEntry,
    SkippedEntry,
    SourceEntry,
    Weights,
    required_to_read,
)
from .reader import Bundle
from .tensor_file import TensorFileReader, TensorFileWriter, TensorLayout, write_tensors
from .writer import BundleWriter, is_bundle

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
    "Parameters",
    "ShardEntry",
    "SkippedEntry",
    "SourceEntry",
    "TensorFileReader",
    "TensorFileWriter",
    "TensorLayout",
    "Weights",
    "is_bundle",
    "required_to_read",
    "write_tensors",
]

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
    ParameterEntry,
    Parameters,
    ShardEntry,
    SkippedEntry,
    SourceEntry,
    Weights,
)
from .reader import Bundle
from .tensor_file import TensorFileReader, TensorFileWriter, TensorLayout, write_tensors
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
    "write_tensors",
]

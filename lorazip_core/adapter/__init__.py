"""PEFT LoRA adapters on disk: read lazily, checked, and written back.

An adapter is a directory with ``adapter_config.json`` and weights. For each target module it holds factors
``B`` [d_out, r] and ``A`` [r, d_in] of an update ``ΔW = scale · B A``, with scale = alpha/r, or alpha/√r with rsLoRA.
"""

from .collection import Collection, open_collection
from .config import LoraConfig, NotLora, parse_config
from .discovery import AdapterFolder, Found, Skipped, find_adapters, presence, weights_beside
from .layout import TORCH_DTYPES, Layout, TensorInfo, aligned, view, views
from .module import Kind, Module
from .reader import Adapter, Part, open_adapter
from .weights import Descriptor, read_fully
from .writer import write_adapter

__all__ = [
    "TORCH_DTYPES",
    "Adapter",
    "AdapterFolder",
    "Collection",
    "Descriptor",
    "Found",
    "Kind",
    "Layout",
    "LoraConfig",
    "Module",
    "NotLora",
    "Part",
    "Skipped",
    "TensorInfo",
    "aligned",
    "find_adapters",
    "open_adapter",
    "open_collection",
    "parse_config",
    "presence",
    "read_fully",
    "view",
    "views",
    "weights_beside",
    "write_adapter",
]

"""PEFT LoRA adapters on disk: read lazily, checked, and written back.

An adapter is a directory with ``adapter_config.json`` and weights. For each target module it holds factors
``B`` [d_out, r] and ``A`` [r, d_in] of an update ``ΔW = scale · B A``, with scale = alpha/r, or alpha/√r with rsLoRA.
"""

from .collection import Collection, Skipped, find_adapters, inside, open_collection
from .config import LoraConfig, NotLora, parse_config
from .experts import fuse
from .layout import TORCH_DTYPES, Layout, TensorInfo, aligned, deinterleave, view, views
from .module import Kind, Module, Parameter
from .notes import notes
from .reader import Adapter, Part, open_adapter
from .unreadable import unreadable
from .weights import Descriptor, read_fully
from .writer import write_adapter

__all__ = [
    "TORCH_DTYPES",
    "Adapter",
    "Collection",
    "Descriptor",
    "Kind",
    "Layout",
    "LoraConfig",
    "Module",
    "NotLora",
    "Parameter",
    "Part",
    "Skipped",
    "TensorInfo",
    "aligned",
    "deinterleave",
    "find_adapters",
    "fuse",
    "inside",
    "notes",
    "open_adapter",
    "open_collection",
    "parse_config",
    "read_fully",
    "unreadable",
    "view",
    "views",
    "write_adapter",
]

"""PEFT LoRA adapters on disk: read lazily, checked, and written back.

An adapter is a directory with ``adapter_config.json`` and weights. For each target module it holds factors
``B`` [d_out, r] and ``A`` [r, d_in] of an update ``ΔW = scale · B A``, with scale = alpha/r, or alpha/√r with rsLoRA.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import LoraConfig, NotLora, parse_config
from .module import Kind, Module, Parameter

if TYPE_CHECKING:
    from .collection import Collection, open_collection
    from .discovery import AdapterFolder, Found, Skipped, find_adapters, presence, weights_beside
    from .experts import fuse
    from .layout import TORCH_DTYPES, Layout, TensorInfo, aligned, deinterleave, view, views
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
    "Parameter",
    "Part",
    "Skipped",
    "TensorInfo",
    "aligned",
    "deinterleave",
    "find_adapters",
    "fuse",
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

# Importing torch takes seconds: these are imported when they are asked for.
_WITH_TORCH = {
    "Adapter": ".reader",
    "AdapterFolder": ".discovery",
    "Collection": ".collection",
    "Descriptor": ".weights",
    "Found": ".discovery",
    "Layout": ".layout",
    "Part": ".reader",
    "Skipped": ".discovery",
    "TORCH_DTYPES": ".layout",
    "TensorInfo": ".layout",
    "aligned": ".layout",
    "deinterleave": ".layout",
    "find_adapters": ".discovery",
    "fuse": ".experts",
    "open_adapter": ".reader",
    "open_collection": ".collection",
    "presence": ".discovery",
    "read_fully": ".weights",
    "view": ".layout",
    "views": ".layout",
    "weights_beside": ".discovery",
    "write_adapter": ".writer",
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WITH_TORCH[name], __name__), name)

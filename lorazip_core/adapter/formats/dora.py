"""DoRA: W = m · (W₀ + ΔW) / ‖W₀ + ΔW‖ row by row, with ΔW = scale · B A as in LoRA and a magnitude m for every row.

The magnitudes are carried exactly, as extras; only ΔW is compressed. Squared errors are those of ΔW.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...base.errors import AdapterError
from ..layout import TensorInfo
from ..module import Part
from .names import PREFIX

_MAGNITUDE = ".lora_magnitude_vector"


def is_magnitude(key: str) -> bool:
    """Whether a tensor of this name holds the magnitudes of a module."""
    return key.startswith(PREFIX) and key.endswith(_MAGNITUDE)


def check_magnitudes(adapter: str, use_dora: bool, parts: Mapping[str, Part], extras: Mapping[str, TensorInfo]) -> None:
    """Raise AdapterError unless exactly the modules of a DoRA adapter have magnitudes, one element for each row."""
    magnitudes = {key.removeprefix(PREFIX).removesuffix(_MAGNITUDE): key for key in extras if is_magnitude(key)}
    for name, key in magnitudes.items():
        if not use_dora:
            raise AdapterError(adapter, f"tensor {key} is of DoRA, but use_dora is not set", "set it if it is DoRA")
        if name not in parts:
            raise AdapterError(adapter, f"tensor {key} is of DoRA, but module {name} has no lora_A and lora_B")
        shape, module = extras[key].shape, parts[name].module
        if math.prod(shape) != module.d_out:
            raise AdapterError(adapter, f"tensor {key} is {list(shape)}, but module {name} is {module.shape}")
    if use_dora and (missing := sorted(parts.keys() - magnitudes.keys())):
        raise AdapterError(
            adapter, f"DoRA (use_dora), but module {missing[0]} has no lora_magnitude_vector", "save it again with PEFT"
        )

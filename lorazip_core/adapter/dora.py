"""DoRA: W = m · (W₀ + ΔW) / ‖W₀ + ΔW‖ row by row, with ΔW = scale · B A as in LoRA and a magnitude m for every row.

The magnitudes are carried exactly, as extras; only ΔW is compressed. Squared errors are those of ΔW.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..base.errors import AdapterError
from .module import Module
from .names import PREFIX

_MAGNITUDE = ".lora_magnitude_vector"


def is_magnitude(key: str) -> bool:
    """Whether a tensor of this name holds the magnitudes of a module."""
    return key.startswith(PREFIX) and key.endswith(_MAGNITUDE)


def check_magnitudes(
    adapter: str, use_dora: bool, modules: Mapping[str, Module], extras: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise AdapterError unless exactly the ``modules`` of a DoRA adapter have magnitudes, one number for each row.

    ``extras`` maps the names of all tensors that are no factors to their shapes.
    """
    magnitudes = {key.removeprefix(PREFIX).removesuffix(_MAGNITUDE): key for key in extras if is_magnitude(key)}
    for name, key in magnitudes.items():
        if not use_dora:
            raise AdapterError(adapter, f"tensor {key} is of DoRA, but use_dora is not set", "set it if it is DoRA")
        if name not in modules:
            raise AdapterError(adapter, f"tensor {key} is of DoRA, but module {name} has no lora_A and lora_B")
        if math.prod(extras[key]) != modules[name].d_out:
            shape = list(extras[key])
            raise AdapterError(adapter, f"tensor {key} is {shape}, but module {name} is {modules[name].shape}")
    if use_dora and (missing := sorted(modules.keys() - magnitudes.keys())):
        raise AdapterError(
            adapter, f"DoRA (use_dora), but module {missing[0]} has no lora_magnitude_vector", "save it again with PEFT"
        )

"""An adapter written as PEFT writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..base.filesystem import chmod_to_umask, naming, write_file
from .config import CONFIG_NAME
from .module import Module
from .weights import SAFETENSORS


def write_adapter(
    folder: Path,
    config: dict[str, Any],
    factors: dict[Module, tuple[Tensor, Tensor]],
    extras: dict[str, Tensor],
    readme: str,
) -> None:
    """Write ``adapter_config.json``, ``adapter_model.safetensors`` and ``README.md`` into ``folder``.

    ``factors`` maps a module to B [d_out, r] and A [r, d_in], with ΔW = (lora_alpha / r) · B A under ``config``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(extras)
    for module, (b, a) in factors.items():
        key_b, key_a = module.keys
        shaped_b, shaped_a = module.to_peft(b, a)
        tensors[key_b], tensors[key_a] = shaped_b.contiguous(), shaped_a.contiguous()
    with naming(folder / SAFETENSORS):
        save_file(tensors, folder / SAFETENSORS, metadata={"format": "pt"})
    chmod_to_umask(folder / SAFETENSORS)
    write_file(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
    write_file(folder / "README.md", readme.encode())

"""An adapter written as PEFT writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ...base.filesystem import chmod_to_umask, naming, write_file
from ..module import Module
from .names import CONFIG_NAME, SAFETENSORS
from .peft import factor_keys, shaped
from .target_parameters import fuse

README = "README.md"
WRITTEN = (CONFIG_NAME, SAFETENSORS, README)


def write_adapter(
    folder: Path,
    config: dict[str, Any],
    factors: dict[Module, tuple[Tensor, Tensor]],
    extras: dict[str, Tensor],
    readme: str,
) -> None:
    """Write the files of ``WRITTEN`` into ``folder``.

    ``factors`` maps a module to B [d_out, r] and A [r, d_in], with ΔW = scale · B A under ``config``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(extras)
    for module, (b, a) in fuse(factors).items():
        for key, factor in zip(factor_keys(module), shaped(module, b, a), strict=True):
            tensors[key] = factor.contiguous()
    with naming(folder / SAFETENSORS):
        save_file(tensors, folder / SAFETENSORS, metadata={"format": "pt"})
    chmod_to_umask(folder / SAFETENSORS)
    write_file(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
    write_file(folder / README, readme.encode())

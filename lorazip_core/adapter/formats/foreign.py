"""LoRA files that other tools than PEFT write, recognised so that each is refused by its own name.

Their file names and tensor names are those of kohya's sd-scripts, diffusers, mlx-lm and torchtune.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from ...base.errors import AdapterError, AdapterErrors
from ..unreadable import unreadable


class Tool(NamedTuple):
    """How another tool stores LoRA: whose it is, what makes a PEFT adapter of it, and what tells it."""

    owner: str
    hint: str
    tensor: re.Pattern[str]
    """The names of its tensors."""
    file: re.Pattern[str]
    """The names of its files, as far as no other tool uses them."""
    fields: frozenset[str] = frozenset()
    """Fields of its configuration, if that is a JSON file of the same name as PEFT's."""


KOHYA = Tool(
    "kohya's sd-scripts",
    "convert it with examples/lora_dreambooth/convert_kohya_ss_sd_lora_to_peft.py of the PEFT repository",
    re.compile(r"lora_(?:unet|te\d?|transformer|prior)_[^.]+\.(?:lora_(?:down|up|mid)\.weight|alpha|hada_.*|lokr_.*)"),
    re.compile(r"(?!)"),
)
DIFFUSERS = Tool(
    "diffusers",
    "convert it with convert_state_dict_to_peft of diffusers.utils, to one adapter for each model of the pipeline",
    re.compile(
        r"(?:unet|text_encoder(?:_\d)?|transformer\.\w*transformer_blocks|diffusion_model)"
        r"\..*(?:\.lora(?:_[AB]|\.down|\.up)\.weight|lora_linear_layer\..*)"
        r"|.*\.processor\..*_lora\.(?:down|up)\.weight"
    ),
    re.compile(r"pytorch_lora_weights\.(?:safetensors|bin)"),
)
MLX = Tool(
    "MLX (mlx-lm)",
    "convert it: lora_a and lora_b transposed are lora_A.weight and lora_B.weight, and lora_alpha is scale times rank",
    re.compile(r".+\.lora_[ab]"),
    re.compile(r"(?:\d+_)?adapters\.(?:safetensors|npz)"),
    frozenset({"fine_tune_type", "lora_parameters", "lora_layers"}),
)
TORCHTUNE = Tool(
    "torchtune",
    "convert it with tune_to_peft_adapter_weights of torchtune.models.convert_weights",
    re.compile(r".+\.lora_[ab]\.weight"),
    re.compile(r"adapter_(?:\d+|model)\.pt"),
)
_TOOLS = (KOHYA, DIFFUSERS, MLX, TORCHTUNE)


def tool_of_tensors(names: Iterable[str]) -> Tool | None:
    """The tool that names tensors like one of these, or None."""
    return next((each for name in names for each in _TOOLS if each.tensor.fullmatch(name)), None)


def tool_of_config(fields: Iterable[str]) -> Tool | None:
    """The tool whose configuration has one of these fields, or None."""
    return next((each for each in _TOOLS if not each.fields.isdisjoint(fields)), None)


def tool_of_file(path: Path) -> Tool | None:
    """The other tool that wrote a file, told by its name or those of its tensors; else None."""
    if not path.is_file():
        return None
    for each in _TOOLS:
        if each.file.fullmatch(path.name):
            return each
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return tool_of_tensors(file.keys())
    except (SafetensorError, OSError):
        return None  # nothing that lorazip would have read


def refuse_foreign_file(path: Path) -> None:
    """Raise AdapterErrors for a file that another tool wrote, given where a directory of adapters is wanted."""
    if tool := tool_of_file(path):
        raise AdapterErrors([AdapterError(str(path), f"it is a LoRA of {tool.owner}, not of PEFT", tool.hint)])


def refuse_foreign(adapter: str, folder: Path) -> None:
    """Raise AdapterError when another tool wrote a file in ``folder``, which has no PEFT adapter."""
    files = [(path.name, tool) for path in sorted(folder.iterdir()) if (tool := tool_of_file(path))]
    if files:
        name, tool = files[0]
        more = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
        raise AdapterError(adapter, f"{name} is a LoRA of {tool.owner}, not of PEFT{more}", tool.hint)


def foreign_adapters(root: Path, adapters: Container[Path]) -> Iterator[AdapterError]:
    """An error for every folder at or below ``root`` with files of another tool, but for the folders in ``adapters``.

    Or with files of which nobody can tell. Hidden folders are skipped and links are not followed.
    """
    for place, folders, _ in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        folder = Path(place)
        if folder in adapters:
            continue
        name = folder.relative_to(root).as_posix()
        try:
            with unreadable(name):
                refuse_foreign(name, folder)
        except AdapterError as error:
            yield error

"""One adapter, opened: headers are read and checked at once, tensors when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import AdapterError
from .config import CONFIG_NAME, LoraConfig, parse_config
from .module import Module, module_of, split_key
from .weights import FLOATS, HandlePool, TensorInfo, read_header, read_tensor, weight_files


class Part(NamedTuple):
    """What one adapter has for one module: rank, scale, and where the two factors are."""

    module: Module
    rank: int
    scale: float
    key_b: str
    key_a: str

    @property
    def parameters(self) -> int:
        """Numbers in both factors."""
        return self.rank * (self.module.d_out + self.module.d_in)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk. ``parts`` goes by module name, in order; ``extras`` are all its other tensors."""

    name: str
    folder: Path
    config: LoraConfig
    config_text: bytes
    parts: dict[str, Part]
    extras: dict[str, TensorInfo]
    files: tuple[Path, ...]
    _tensors: dict[str, TensorInfo]
    _pool: HandlePool

    def factors(self, module: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """B [d_out, r], the scale folded in, and A [r, d_in], so that ΔW = B A."""
        part = self.parts[module]
        b, a = self.stored_factors(module)
        return b.to(dtype) * part.scale, a.to(dtype)

    def stored_factors(self, module: str) -> tuple[Tensor, Tensor]:
        """B [d_out, r] and A [r, d_in] as they are in the file: its dtype, without the scale."""
        part = self.parts[module]
        b, a = self.tensor(part.key_b), self.tensor(part.key_a)
        return b.reshape(part.module.d_out, part.rank), a.reshape(part.rank, part.module.d_in)

    def extra(self, key: str) -> Tensor:
        """A tensor that is no LoRA factor. A bias of lora_B comes with the scale folded in, like B itself."""
        tensor = self.tensor(key)
        module = key.removeprefix("base_model.model.").removesuffix(".lora_B.bias")
        return tensor * self.parts[module].scale if key.endswith(".lora_B.bias") else tensor

    def tensor(self, key: str) -> Tensor:
        """Any tensor of the file, by its name there."""
        return read_tensor(self.name, key, self._tensors[key], self._pool)

    def dtype(self, module: str) -> str:
        """The dtype of a module's factors in the file, as safetensors writes it (``BF16``)."""
        return self._tensors[self.parts[module].key_b].dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(path.stat().st_size for path in self.files)


def open_adapter(
    name: str,
    folder: Path,
    *,
    allow_pickle: bool = False,
    pool: HandlePool | None = None,
    present: Callable[[Path], bool] = Path.is_file,
) -> Adapter:
    """Open the adapter in ``folder``. Raises AdapterError with all that can be known from the headers.

    ``present`` decides which files count as being there: a collection leaves out links that lead outside of it.
    """
    pool = pool or HandlePool()
    if not present(folder / CONFIG_NAME):
        raise AdapterError(name, f"no {CONFIG_NAME}: not an adapter")
    config_text = (folder / CONFIG_NAME).read_bytes()
    config = parse_config(name, config_text)
    weights = weight_files(name, folder, allow_pickle=allow_pickle, present=present)
    tensors = read_header(name, weights, pool)
    parts = _parts(name, config, tensors)
    taken = {key for part in parts.values() for key in (part.key_a, part.key_b)}
    extras = {key: tensors[key] for key in sorted(tensors) if key not in taken}
    for key in extras:
        _check_extra(name, key, parts)
    files = (folder / CONFIG_NAME, *weights)
    return Adapter(name, folder, config, config_text, parts, extras, files, tensors, pool)


def _parts(adapter: str, config: LoraConfig, tensors: dict[str, TensorInfo]) -> dict[str, Part]:
    keys: dict[str, dict[str, str]] = {}
    embeddings = set()
    for key in tensors:
        if split := split_key(key):
            module, side, embedding = split
            keys.setdefault(module, {})[side] = key
            if embedding:
                embeddings.add(module)
    if not keys:
        some = next(iter(tensors), "none at all")
        raise AdapterError(
            adapter, f"no tensor is named base_model.model.….lora_A.weight (first: {some}): not a PEFT LoRA adapter"
        )
    return {
        module: _part(adapter, config, module, keys[module], module in embeddings, tensors) for module in sorted(keys)
    }


def _part(
    adapter: str,
    config: LoraConfig,
    name: str,
    keys: dict[str, str],
    embedding: bool,
    tensors: dict[str, TensorInfo],
) -> Part:
    for side in "AB":
        if side not in keys:
            raise AdapterError(adapter, f"module {name} has lora_{'AB'.replace(side, '')} but no lora_{side}")
        if tensors[keys[side]].dtype not in FLOATS:
            raise AdapterError(adapter, f"tensor {keys[side]} is {tensors[keys[side]].dtype}, not a float of 16+ bits")
    a, b = tensors[keys["A"]], tensors[keys["B"]]
    try:
        module = module_of(name, embedding, a.shape, b.shape)
    except ValueError as error:
        raise AdapterError(adapter, f"module {name}: {error}") from None
    rank = a.shape[0]
    if rank != config.rank(name):
        raise AdapterError(
            adapter, f"module {name} has rank {rank} in the weights and {config.rank(name)} in {CONFIG_NAME}"
        )
    return Part(module, rank, config.scale(name, rank), keys["B"], keys["A"])


def _check_extra(adapter: str, key: str, parts: dict[str, Part]) -> None:
    """An extra must not be a LoRA factor in disguise: it would be carried along unused and the update lost."""
    if ".lora_magnitude_vector" in key:
        raise AdapterError(adapter, f"DoRA is not supported: its update is not B A (tensor {key})")
    if key.endswith(".lora_B.bias"):
        module = key.removeprefix("base_model.model.").removesuffix(".lora_B.bias")
        if module in parts:
            return
    if ".lora_" in key:
        raise AdapterError(adapter, f"tensor {key} looks like a LoRA factor but is not named as PEFT names it")

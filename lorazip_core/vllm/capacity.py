"""How many adapters the memory of one GPU holds: of a bundle, and as ordinary LoRA in vLLM's slots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from ..base.errors import UsageError
from ..bundle.manifest import ModuleEntry
from ..bundle.reader import Bundle
from ..export.vllm import max_lora_rank

if TYPE_CHECKING:
    from ..serving.resident_size import ResidentSize

_ITEMSIZE = 2  # of bf16


class Slots(Struct, frozen=True):
    """Ordinary LoRA in vLLM, which reserves a slot for every adapter of a batch, all of one rank, in bf16."""

    rank: int
    """The largest rank of the adapters as they were, rounded up to one that vLLM allows."""
    bytes: int
    """Of one slot: factors of that rank for every module of the bundle."""
    in_bytes_of_bundle: int
    """How many slots take no more than the bundle does."""
    fit: int | None = None
    """How many fit into the memory of the GPU; null if that is not known."""


class Memory(Struct, frozen=True):
    """The memory of one GPU in bytes, and what of it is left for adapters."""

    bytes: int
    bytes_model: int | None
    """The weights of the base model as they are stored; null if no model was given, and none are counted."""
    bytes_cache: int
    """What is set aside for the KV cache, activations and all else."""
    bytes_adapters: int
    """What is left; negative if the rest does not fit."""
    fit: int
    """How many adapters fit that add as much as those of the bundle do on average, beside what they share."""


class ServingInfo(Struct, frozen=True):
    """What serving takes on a device; ``memory`` is null if no size was given."""

    slots: Slots
    memory: Memory | None


def serving_info(
    bundle: Bundle, held: ResidentSize, *, gpu_memory: int | None, cache_share: float, model: Path | None
) -> ServingInfo:
    """Compare what is ``held`` of a bundle with slots, and with a GPU of ``gpu_memory`` bytes if that is given.

    ``cache_share`` of the memory is set aside for the KV cache and all else; ``model`` is a directory with the base
    model's safetensors files. Raises UsageError for a directory that has none or other modules, AdapterError for a
    configuration that is not an adapter's, and Unsupported for ranks above vLLM's largest.
    """
    rank = max_lora_rank([_largest_rank(bundle)])
    slot = slot_bytes(bundle.manifest.modules, rank)
    memory = None
    if gpu_memory is not None:
        weights = None if model is None else _model_bytes(model, bundle.manifest.modules)
        cache = round(gpu_memory * cache_share)
        left = gpu_memory - cache - (weights or 0)
        own = sum(held.own_bytes)
        fit = (left - (held.nbytes - own)) * len(held.own_bytes) // own
        memory = Memory(gpu_memory, weights, cache, left, max(fit, 0))
    fit_slots = None if memory is None else max(memory.bytes_adapters // slot, 0)
    return ServingInfo(Slots(rank, slot, held.nbytes // slot, fit_slots), memory)


def slot_bytes(modules: Sequence[ModuleEntry], rank: int) -> int:
    """Bytes that vLLM reserves on the device for one adapter of ``rank`` on these modules, in bf16."""
    return sum(_ITEMSIZE * rank * (module.d_out + module.d_in) for module in modules)


def _largest_rank(bundle: Bundle) -> int:
    """Of the adapters as they were; adapters with equal configurations share one."""
    from ..adapter.formats.registry import parse_config  # loads PyTorch

    first = {adapter.config: adapter for adapter in bundle.manifest.adapters}
    configs = [parse_config(adapter.name, bundle.config_text(adapter)) for adapter in first.values()]
    return max(config.largest_rank or config.r for config in configs)


def _model_bytes(model: Path, modules: Sequence[ModuleEntry]) -> int:
    from .base_weights import mismatch, nbytes, read_weights  # loads PyTorch

    weights = read_weights(model)
    if not weights:
        raise UsageError(f"{model} has no safetensors files", "name the directory of the base model with «model»")
    if found := mismatch(weights, modules):
        raise UsageError(f"{model} is not the base model of these adapters: {found}", "name another «model»")
    return nbytes(weights)

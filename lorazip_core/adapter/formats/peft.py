"""PEFT's form: which tensors are B and A of which module, and what the others are."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ...base.errors import AdapterError
from ...base.safetensors_header import TORCH_DTYPES
from ..layout import FLOATS, Cut, Layout, TensorInfo
from ..module import Kind, Module, Part
from . import lora_bias
from .dora import check_magnitudes, is_magnitude
from .foreign import tool_of_tensors
from .format import Format, LoraConfig, WeightNames
from .names import CONFIG_NAME, INDEX, PICKLE, PREFIX, SAFETENSORS
from .peft_besides import base_weights, besides
from .peft_config import parse_config
from .peft_notes import notes
from .target_parameters import Whole, cut_experts, find_targets
from .wrappers import ordinary_names

_FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB])(?:\.weight)?)")


def factor_keys(module: Module) -> tuple[str, str]:
    """The names of B and A."""
    if module.kind == "embedding":
        return f"{PREFIX}{module.name}.lora_embedding_B", f"{PREFIX}{module.name}.lora_embedding_A"
    return f"{PREFIX}{module.name}.lora_B.weight", f"{PREFIX}{module.name}.lora_A.weight"


def shaped(module: Module, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """B [d_out, r] and A [r, d_in] in the shapes that PEFT gives them: a convolution's A regains its kernel."""
    if module.kind != "conv":
        return b, a
    channels = module.d_in // math.prod(module.kernel)
    return b.reshape(*b.shape, *(1 for _ in module.kernel)), a.reshape(a.shape[0], channels, *module.kernel)


def _module(name: str, embedding: bool, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> Module:
    """The module whose factors have these shapes.

    Raises ValueError, with the two shapes, when no layer has such factors or when their ranks differ.
    """
    kernel = a_shape[2:]
    if len(a_shape) < 2 or len(b_shape) != len(a_shape) or any(size != 1 for size in b_shape[2:]):
        raise ValueError(f"lora_A {list(a_shape)} and lora_B {list(b_shape)} do not belong to one layer")
    if a_shape[0] != b_shape[1]:
        grouped = ": a grouped convolution, whose update is not B A?" if kernel else ""
        raise ValueError(
            f"lora_A {list(a_shape)} has rank {a_shape[0]}, lora_B {list(b_shape)} has rank {b_shape[1]}{grouped}"
        )
    if 0 in a_shape + b_shape:
        raise ValueError(f"lora_A {list(a_shape)} and lora_B {list(b_shape)}: a dimension is zero")
    kind: Kind = "embedding" if embedding else "conv" if kernel else "linear"
    return Module(name, kind, b_shape[0], math.prod(a_shape[1:]), kernel)


def _find_parts(adapter: str, config: LoraConfig, layout: Layout) -> tuple[dict[str, Part], Layout]:
    tensors = layout.tensors
    wholes = _wholes(adapter, tensors)
    targets = find_targets(adapter, config, wholes)
    parts = {name: _part(adapter, config, whole, layout) for name, whole in wholes.items() if name not in targets}
    if not targets:
        return parts, layout
    infos: dict[str, TensorInfo] = {}
    cuts: dict[str, Cut] = {}
    for name, target in targets.items():
        scale = config.scale(target.name, target.rank)
        experts, own_infos, own_cuts = cut_experts(target, scale, wholes[name], tensors)
        parts |= {expert.module.name: expert for expert in experts}
        infos |= own_infos
        cuts |= own_cuts
    return dict(sorted(parts.items())), replace(layout, tensors=tensors | infos, cuts=cuts)


def _wholes(adapter: str, tensors: Mapping[str, TensorInfo]) -> dict[str, Whole]:
    """All pairs of factors, by what they are named after, in order."""
    keys: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for key in tensors:
        if match := _FACTOR.fullmatch(key):
            name, linear, embedding = match.groups()
            keys[name][linear or embedding] = key
    if keys:
        return {name: _whole(adapter, name, keys[name], tensors) for name in sorted(keys)}
    if tool := tool_of_tensors(tensors):
        raise AdapterError(adapter, f"its tensors are those of {tool.owner}, not of PEFT", tool.hint)
    some = next(iter(tensors), "none at all")
    raise AdapterError(
        adapter, f"no tensor is named base_model.model.….lora_A.weight (first: {some}): not a PEFT LoRA adapter"
    )


def _whole(adapter: str, name: str, keys: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> Whole:
    for side in "AB":
        if side not in keys:
            raise AdapterError(adapter, f"module {name} has lora_{'AB'.replace(side, '')} but no lora_{side}")
        if tensors[keys[side]].dtype not in FLOATS:
            raise AdapterError(adapter, f"tensor {keys[side]} is {tensors[keys[side]].dtype}, not a float of 16+ bits")
    a, b = tensors[keys["A"]].shape, tensors[keys["B"]].shape
    embedding = any(".lora_embedding_" in key for key in keys.values())
    try:
        return Whole(_module(name, embedding, a, b), a[0], keys["B"], keys["A"])
    except ValueError as error:
        raise AdapterError(adapter, f"module {name}: {error}") from None


def _part(adapter: str, config: LoraConfig, whole: Whole, layout: Layout) -> Part:
    module, rank, key_b, key_a = whole
    # Patterns may be meant for the name within a training wrapper, or without it.
    within = layout.stored.get(key_a, key_a).partition(PREFIX)[2].rpartition(".lora_")[0]
    names = {module.name, within or module.name}
    scales = {config.scale(each, rank) for each in names if config.rank(each) == rank}
    if not scales:
        raise AdapterError(
            adapter,
            f"module {module.name} has rank {rank} in the weights and {config.rank(module.name)} in {CONFIG_NAME}",
        )
    if len(scales) > 1:
        both = " or ".join(sorted(names))
        raise AdapterError(adapter, f"{CONFIG_NAME}: alpha_pattern does not tell the scale of {both}", "save it again")
    return Part(module, rank, scales.pop(), key_b, key_a)


def _check_extras(
    adapter: str, config: LoraConfig, parts: Mapping[str, Part], extras: Mapping[str, TensorInfo]
) -> None:
    """An extra must not be a LoRA factor in disguise: it would be carried along unused and the update lost."""
    for key, info in extras.items():
        if info.dtype not in TORCH_DTYPES:
            raise AdapterError(
                adapter, f"tensor {key} is {info.dtype}, which is not supported", "leave the adapter out"
            )
        if is_magnitude(key):
            continue
        biased = lora_bias.biased_module(key)
        if biased is not None and info.dtype not in FLOATS:
            raise AdapterError(adapter, f"tensor {key} is {info.dtype}, not a float of 16+ bits")
        if ".lora_" in key and biased not in parts:
            raise AdapterError(adapter, f"tensor {key} looks like a LoRA factor but is not named as PEFT names it")
    check_magnitudes(adapter, config.use_dora, parts, extras)


PEFT = Format(
    weights=WeightNames(SAFETENSORS, INDEX, PICKLE, ("adapter_model.", "adapter_model-")),
    recognises=lambda config: "peft_type" in config,
    parse_config=parse_config,
    ordinary_names=ordinary_names,
    find_parts=_find_parts,
    check_extras=_check_extras,
    extra=lora_bias.folded,
    notes=notes,
    besides=besides,
    base_weights=base_weights,
)

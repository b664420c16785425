"""Which layers of a vLLM model hold the modules of a bundle, and adding ΔŴ x behind each of them.

The seam is ``layer.quant_method.apply``: what it computes, quantised or not, is added to. A tensor-parallel rank
computes a part of the rows of ΔW, or of its columns, as its layer does of W.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from ..base.errors import LocalError
from ..bundle.manifest import ModuleEntry
from ..serving.layers import Layer, Slice
from ..serving.store import Call

_SHOWN = 3


def layers_of(model: Any, modules: Iterable[ModuleEntry]) -> list[Layer]:
    """Every layer of ``model`` that has some of the ``modules``.

    Raises LocalError for a module that is not there, has another size, or is of a kind that cannot be served.
    """
    wanted = {_renamed(model, module.name): module for module in modules}
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    absorbed = {id(module.kv_b_proj) for module in model.modules() if isinstance(module, MLAAttention)}
    found: list[Layer] = []
    seen: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, LinearBase):
            continue
        parent, _, last = name.rpartition(".")
        parts = [f"{parent}.{part}" if parent else part for part in packed.get(last, [last])]
        if not any(part in wanted for part in parts):
            continue
        if id(module) in absorbed:
            raise LocalError(
                f"layer {name} of the model is multiplied into others by multi-head latent attention, "
                "so that no adapter can be put on it"
            )
        starts, widths, sizes = _rows(module, len(parts), name)
        taken = _columns(module)
        slices, column = [], 0
        for part, start, width, size in zip(parts, starts, widths, sizes, strict=True):
            if (entry := wanted.get(part)) is not None:
                if (entry.d_out, entry.d_in) != (size, module.input_size):
                    raise LocalError(
                        f"module {entry.name} is [{entry.d_out}, {entry.d_in}] in the bundle, but [{size}, "
                        f"{module.input_size}] in the model: is it its base model?"
                    )
                slices.append(Slice(entry.name, column, range(start, start + width), taken))
                seen.add(part)
            column += width
        found.append(Layer(name, tuple(slices)))
    if missing := [entry.name for part, entry in wanted.items() if part not in seen]:
        more = ", …" if len(missing) > _SHOWN else ""
        raise LocalError(
            f"{len(missing)} of {len(wanted)} modules of the bundle are no linear layers of the model: "
            f"{', '.join(missing[:_SHOWN])}{more}: is it its base model?"
        )
    return found


def put_behind(layer: Any, calls: list[Call], batch: Tensor) -> None:
    """From now on ``layer`` adds what the operators ``calls`` add for the ``batch``."""
    layer.quant_method = Added(layer.quant_method, calls, batch)
    # From vLLM 0.30 on: a layer may else be given what is quantised already, which ΔŴ cannot be applied to.
    layer.requires_unquantized_input = True


class Added(QuantizeMethodBase):
    """The method of a layer, and y += ΔŴ x."""

    def __init__(self, base: Any, calls: list[Call], batch: Tensor) -> None:
        self.base = base
        self.calls = calls
        self.batch = batch

    def create_weights(self, layer: nn.Module, *arguments: Any, **options: Any) -> None:
        self.base.create_weights(layer, *arguments, **options)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.base.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.base.apply(layer, x, bias)
        flat_y, flat_x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        for call in self.calls:
            call(flat_y, flat_x, self.batch)
        return y


def _renamed(model: Any, name: str) -> str:
    """What vLLM calls a module of the checkpoint, before it puts some of them side by side."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return name
    stacked: dict[str, Any] = {"orig_to_new_stacked": {}} if hasattr(mapper, "orig_to_new_stacked") else {}
    found = replace(mapper, **stacked).apply_list([f"{name}.weight"])
    return found[0].removesuffix(".weight") if found else name


def _rows(module: Any, parts: int, name: str) -> tuple[list[int], list[int], list[int]]:
    """Of each part of a layer: the first of the rows of its ΔW that this rank computes, how many these are, and all."""
    if isinstance(module, (ReplicatedLinear, RowParallelLinear)):
        widths = list(module.output_partition_sizes)
        ranks = [0] * len(widths)
        copies = [1] * len(widths)
    elif isinstance(module, QKVParallelLinear):
        widths = list(module.output_partition_sizes)
        kv = module.num_kv_head_replicas
        ranks = [module.tp_rank, module.tp_rank // kv, module.tp_rank // kv]
        copies = [module.tp_size, module.tp_size // kv, module.tp_size // kv]
    elif isinstance(module, ColumnParallelLinear):
        widths = list(module.output_partition_sizes)
        ranks, copies = [module.tp_rank] * len(widths), [module.tp_size] * len(widths)
    else:
        raise LocalError(f"layer {name} of the model is a {type(module).__name__}, which no adapter can be put on")
    if parts == 1 and len(widths) > 1 and all(copy == 1 for copy in copies):
        widths, ranks, copies = [sum(widths)], [0], [1]  # one matrix in the checkpoint, too
    if parts != len(widths):
        raise LocalError(f"layer {name} has {len(widths)} parts in the engine and {parts} in the bundle")
    starts = [rank * width for rank, width in zip(ranks, widths, strict=True)]
    return starts, widths, [copy * width for copy, width in zip(copies, widths, strict=True)]


def _columns(module: Any) -> range:
    """The columns of ΔW that this rank computes."""
    if isinstance(module, RowParallelLinear):
        size = module.input_size_per_partition
        return range(module.tp_rank * size, (module.tp_rank + 1) * size)
    return range(module.input_size)

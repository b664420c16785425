"""One adapter, opened: headers are read and checked at once, tensors when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.errors import AdapterError
from ..base.safetensors_header import TORCH_DTYPES
from .config import CONFIG_NAME, LoraConfig, parse_config
from .dora import check_magnitudes, is_magnitude
from .experts import Whole, cut_experts, find_targets
from .foreign import format_of, refuse_foreign
from .layout import Cut, Layout, TensorInfo, view
from .module import Module, module_name, module_of, split_key
from .unreadable import unreadable
from .weights import FLOATS, HandlePool, Layouts, WeightFile, copy_tensor, opener, read_fully, weight_files


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
    """A LoRA adapter on disk. ``parts`` goes by module name, in order; ``extras`` are all its other tensors.

    Adapters of a collection that are alike share their ``layout``, ``parts`` and ``extras``: they are the same objects.
    """

    name: str
    folder: Path
    config: LoraConfig
    config_text: bytes
    parts: dict[str, Part]
    extras: dict[str, TensorInfo]
    files: tuple[Path, ...]
    layout: Layout
    weights: tuple[WeightFile, ...]
    _pool: HandlePool

    def factors(self, module: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """B [d_out, r], the scale folded in, and A [r, d_in], so that ΔW = B A."""
        b, a = self.stored_factors(module)
        return b.to(dtype) * self.parts[module].scale, a.to(dtype)

    def stored_factors(self, module: str) -> tuple[Tensor, Tensor]:
        """B [d_out, r] and A [r, d_in] as they are in the file: its dtype, without the scale."""
        (factors,) = self.each_stored([module])
        return factors

    def each_stored(self, modules: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """`stored_factors` of several modules, in their order; experts that follow each other are read together."""
        parted: dict[str, Tensor] = {}
        for module in modules:
            part = self.parts[module]
            b, a = (self._factor(key, parted) for key in (part.key_b, part.key_a))
            yield b.reshape(part.module.d_out, part.rank), a.reshape(part.rank, part.module.d_in)

    def _factor(self, key: str, parted: dict[str, Tensor]) -> Tensor:
        """A factor; ``parted`` holds the parts of the tensors that the last one was cut from."""
        cut = self.layout.cuts.get(key)
        if cut is None:
            return self.tensor(key)
        if cut.source not in parted:
            if len(parted) > 1:  # B and A of another parameter
                parted.clear()
            parted[cut.source] = cut.all_of(self.tensor(cut.source))
        return parted[cut.source][cut.expert]

    def extra(self, key: str) -> Tensor:
        """A tensor that is no LoRA factor. A bias of lora_B comes with the scale folded in, like B itself.

        It is of its own dtype where that holds the products exactly, else of F32, or F64 where it is F32 itself.
        """
        tensor = self.tensor(key)
        if not key.endswith(".lora_B.bias"):
            return tensor
        module = key.removeprefix("base_model.model.").removesuffix(".lora_B.bias")
        folded = tensor.double() * self.parts[module].scale
        if torch.equal(folded.to(tensor.dtype).double(), folded):
            return folded.to(tensor.dtype)
        return folded.to(torch.float32 if tensor.dtype.itemsize < 4 else torch.float64)

    def tensor(self, key: str) -> Tensor:
        """Any tensor of the layout, by its name there, read into memory of its own."""
        if cut := self.layout.cuts.get(key):
            return cut.all_of(self.tensor(cut.source))[cut.expert]
        info = self.layout.tensors[key]
        weight = self.weights[info.file]
        if weight.header is None:
            stored: Tensor = self._handle(weight)[self.layout.stored.get(key, key)]
            return stored
        data = torch.empty(info.size_bytes, dtype=torch.uint8)
        self.read_into([key], data.numpy().data)
        return view(data, info._replace(begin=0))

    def read_into(self, keys: Sequence[str], buffer: memoryview) -> None:
        """The bytes of tensors that follow each other in one file. Raises AdapterError when they are not all there."""
        infos = [self.layout.tensors[key] for key in keys]
        weight = self.weights[infos[0].file]
        handle = self._handle(weight)
        scattered = any(key in self.layout.cuts and self.layout.cuts[key].interleaved for key in keys)
        if weight.header is None or scattered:
            for key, info in zip(keys, infos, strict=True):
                begin = info.begin - infos[0].begin
                copy_tensor(self.tensor(key), buffer[begin : begin + info.size_bytes])
            return
        position = weight.header.size + infos[0].begin - self.layout.regions[infos[0].file].begin
        count = read_fully(handle.number, [buffer], position)
        if count < len(buffer):
            key = next(key for key, info in zip(keys, infos, strict=True) if info.end - infos[0].begin > count)
            raise AdapterError(self.name, f"{weight.path.name}: tensor {key} is truncated", "fetch it again")

    def _handle(self, weight: WeightFile) -> Any:
        return self._pool.get(weight.path, opener(self.name, weight.path))

    def dtype(self, module: str) -> str:
        """The dtype of a module's factors in the file, as safetensors writes it (``BF16``)."""
        return self.layout.tensors[self.parts[module].key_b].dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(path.stat().st_size for path in self.files)


class Alike:
    """What opening adapters has brought to light so far, for those to come that are alike; the open files besides."""

    def __init__(self) -> None:
        self.pool = HandlePool()
        self.layouts = Layouts(self.pool)
        self._configs: dict[bytes, LoraConfig] = {}
        self._tensors: dict[Any, tuple[dict[str, Part], dict[str, TensorInfo], Layout]] = {}
        self._cut: dict[Any, Layout] = {}

    def config(self, adapter: str, text: bytes) -> LoraConfig:
        """`parse_config`, once for equal texts."""
        config = self._configs.get(text)
        if config is None:
            config = self._configs[text] = parse_config(adapter, text)
        return config

    def tensors(
        self, adapter: str, config: LoraConfig, layout: Layout
    ) -> tuple[dict[str, Part], dict[str, TensorInfo], Layout]:
        """Parts, extras and the layout with what tensors are cut into.

        Once for each layout and whatever of the configuration decides ranks, scales and experts.
        """
        patterns = (tuple(config.rank_pattern.items()), tuple(config.alpha_pattern.items()))
        key = (layout, config.r, config.lora_alpha, config.use_rslora, config.use_dora, patterns, _deciding(config))
        found = self._tensors.get(key)
        if found is None:
            parts, extras, own = _sorted_out(adapter, config, layout)
            # Adapters of one layout have the same modules, which tensors alone do not tell of parameters.
            own = self._cut.setdefault((layout, tuple(own.cuts.items()), tuple(parts)), own)
            found = self._tensors[key] = parts, extras, own
        return found


def open_adapter(
    name: str,
    folder: Path,
    *,
    allow_pickle: bool = False,
    alike: Alike | None = None,
    present: Callable[[Path], bool] = Path.is_file,
) -> Adapter:
    """Open the adapter in ``folder``. Raises AdapterError with all that can be known from the headers.

    ``present`` decides which files count as being there: links are followed, and a collection refuses one that leads to
    nothing (`presence`). With ``alike``, what adapters have in common is shared between them.
    """
    alike = alike or Alike()
    config_file = folder / CONFIG_NAME
    with unreadable(name):
        if not present(config_file):
            refuse_foreign(name, folder)
            raise AdapterError(name, f"no {CONFIG_NAME}: not an adapter")
        config_text = config_file.read_bytes()
        config = alike.config(name, config_text)
        files = weight_files(name, folder, allow_pickle=allow_pickle, present=present)
        layout, weights = alike.layouts.read(name, files)
    parts, extras, layout = alike.tensors(name, config, layout)
    return Adapter(name, folder, config, config_text, parts, extras, (config_file, *files), layout, weights, alike.pool)


def _deciding(config: LoraConfig) -> object:
    """What of a configuration with target parameters decides what is one, and whether it can be used."""
    if not config.target_parameters:
        return None
    return config.target_parameters, str(config.raw.get("target_modules"))


def _sorted_out(
    adapter: str, config: LoraConfig, layout: Layout
) -> tuple[dict[str, Part], dict[str, TensorInfo], Layout]:
    for key, info in layout.tensors.items():
        _refuse_empty(adapter, key, info)
    parts, layout = _parts(adapter, config, layout)
    taken = {key for part in parts.values() for key in (part.key_a, part.key_b)}
    taken |= {cut.source for cut in layout.cuts.values()}
    extras = {key: layout.tensors[key] for key in sorted(layout.tensors) if key not in taken}
    for key in extras:
        _check_extra(adapter, key, extras[key].dtype, parts)
    check_magnitudes(
        adapter,
        config.use_dora,
        {name: part.module for name, part in parts.items()},
        {key: info.shape for key, info in extras.items()},
    )
    return parts, extras, layout


def _refuse_empty(adapter: str, key: str, info: TensorInfo) -> None:
    """DeepSpeed ZeRO-3 spreads parameters over all processes, and what it has not gathered is saved as shape [0]."""
    if info.shape == (0,) and info.dtype in FLOATS:
        raise AdapterError(
            adapter,
            f"tensor {key} is empty, of shape [0]: DeepSpeed ZeRO-3 saved it without gathering the parameters",
            "save it again with zero3_save_16bit_model (Accelerate) or stage3_gather_16bit_weights_on_model_save",
        )


def _parts(adapter: str, config: LoraConfig, layout: Layout) -> tuple[dict[str, Part], Layout]:
    """The parts by module, and the layout with the experts that tensors are cut into."""
    tensors = layout.tensors
    keys: dict[str, dict[str, str]] = {}
    embeddings = set()
    for key in tensors:
        if split := split_key(key):
            module, side, embedding = split
            keys.setdefault(module, {})[side] = key
            if embedding:
                embeddings.add(module)
    if not keys:
        if form := format_of(tensors):
            raise AdapterError(adapter, f"its tensors are those of {form.owner}, not of PEFT", form.hint)
        some = next(iter(tensors), "none at all")
        raise AdapterError(
            adapter, f"no tensor is named base_model.model.….lora_A.weight (first: {some}): not a PEFT LoRA adapter"
        )
    wholes = {name: _whole(adapter, name, keys[name], name in embeddings, tensors) for name in sorted(keys)}
    targets = find_targets(adapter, config, wholes)
    parts: dict[str, Part] = {}
    infos: dict[str, TensorInfo] = {}
    cuts: dict[str, Cut] = {}
    for name, whole in wholes.items():
        key_b, key_a = keys[name]["B"], keys[name]["A"]
        if (target := targets.get(name)) is None:
            parts[name] = _part(adapter, config, whole, key_b, key_a, layout)
            continue
        experts, own_infos, own_cuts = cut_experts(target, key_b, key_a, tensors)
        scale = config.scale(target.name, target.rank)
        parts |= {expert.module.name: Part(expert.module, target.rank, scale, *expert[1:]) for expert in experts}
        infos |= own_infos
        cuts |= own_cuts
    if targets:
        parts = dict(sorted(parts.items()))
    return parts, replace(layout, tensors=tensors | infos, cuts=cuts) if targets else layout


def _whole(adapter: str, name: str, keys: dict[str, str], embedding: bool, tensors: dict[str, TensorInfo]) -> Whole:
    for side in "AB":
        if side not in keys:
            raise AdapterError(adapter, f"module {name} has lora_{'AB'.replace(side, '')} but no lora_{side}")
        if tensors[keys[side]].dtype not in FLOATS:
            raise AdapterError(adapter, f"tensor {keys[side]} is {tensors[keys[side]].dtype}, not a float of 16+ bits")
    a, b = tensors[keys["A"]], tensors[keys["B"]]
    try:
        return Whole(module_of(name, embedding, a.shape, b.shape), a.shape[0])
    except ValueError as error:
        raise AdapterError(adapter, f"module {name}: {error}") from None


def _part(adapter: str, config: LoraConfig, whole: Whole, key_b: str, key_a: str, layout: Layout) -> Part:
    module, rank = whole
    # Patterns may be meant for the name within a training wrapper, or without it.
    names = {module.name, module_name(layout.stored.get(key_a, key_a)) or module.name}
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


def _check_extra(adapter: str, key: str, dtype: str, parts: dict[str, Part]) -> None:
    """An extra must not be a LoRA factor in disguise: it would be carried along unused and the update lost."""
    if dtype not in TORCH_DTYPES:
        raise AdapterError(adapter, f"tensor {key} is {dtype}, which is not supported", "leave the adapter out")
    if is_magnitude(key):
        return
    if key.endswith(".lora_B.bias"):
        if dtype not in FLOATS:
            raise AdapterError(adapter, f"tensor {key} is {dtype}, not a float of 16+ bits")
        module = key.removeprefix("base_model.model.").removesuffix(".lora_B.bias")
        if module in parts:
            return
    if ".lora_" in key:
        raise AdapterError(adapter, f"tensor {key} looks like a LoRA factor but is not named as PEFT names it")

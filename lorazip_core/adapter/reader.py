"""One adapter, opened: headers are read and checked at once, tensors when they are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.errors import AdapterError
from .formats.foreign import refuse_foreign
from .formats.format import Format, LoraConfig
from .formats.names import CONFIG_NAME
from .formats.registry import recognise
from .layout import FLOATS, Layout, TensorInfo, view
from .module import Part
from .unreadable import unreadable
from .weights import HandlePool, Layouts, WeightFile, copy_tensor, opener, read_fully, weight_paths

_Tensors = tuple[dict[str, Part], dict[str, TensorInfo], Layout]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk. ``parts`` goes by module name, in order; ``extras`` are all its other tensors.

    Adapters of a collection that are alike share their ``layout``, ``parts`` and ``extras``: they are the same objects.
    """

    name: str
    folder: Path
    form: Format
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
        """A tensor that is no LoRA factor. What a scale applies to has it folded in, like B in `factors`."""
        return self.form.extra(key, self.tensor(key), self.parts)

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

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(path.stat().st_size for path in self.files)


class Known:
    """What is known of the adapters that were opened so far, for the next ones of the same layout and configuration.

    With it goes the pool of open files.
    """

    def __init__(self) -> None:
        self.pool = HandlePool()
        self.layouts = Layouts(self.pool)
        self._configs: dict[bytes, tuple[Format, LoraConfig]] = {}
        self._tensors: dict[Any, _Tensors] = {}
        self._cut: dict[Any, Layout] = {}

    def config(self, adapter: str, text: bytes) -> tuple[Format, LoraConfig]:
        """The form of an adapter and what its configuration says, parsed once for equal texts."""
        found = self._configs.get(text)
        if found is None:
            form, raw = recognise(adapter, text)
            found = self._configs[text] = form, form.parse_config(adapter, raw)
        return found

    def tensors(self, adapter: str, form: Format, config: LoraConfig, layout: Layout) -> _Tensors:
        """Parts, extras and the layout with what tensors are cut into: once for each layout and what decides it."""
        key = (layout, config.deciding)
        found = self._tensors.get(key)
        if found is None:
            parts, extras, own = _sorted_out(adapter, form, config, layout)
            # Adapters of one layout have the same modules, which tensors alone do not tell of parameters.
            own = self._cut.setdefault((layout, tuple(own.cuts.items()), tuple(parts)), own)
            found = self._tensors[key] = parts, extras, own
        return found


def open_adapter(
    name: str,
    folder: Path,
    *,
    allow_pickle: bool = False,
    known: Known | None = None,
    present: Callable[[Path], bool] = Path.is_file,
) -> Adapter:
    """Open the adapter in ``folder``. Raises AdapterError with all that can be known from the headers.

    ``present`` decides which files count as being there: links are followed, and a collection refuses one that leads to
    nothing (`presence`). With ``known``, what adapters have in common is parsed once and shared.
    """
    known = known or Known()
    config_file = folder / CONFIG_NAME
    with unreadable(name):
        if not present(config_file):
            refuse_foreign(name, folder)
            raise AdapterError(name, f"no {CONFIG_NAME}: not an adapter")
        config_text = config_file.read_bytes()
        form, config = known.config(name, config_text)
        paths = weight_paths(name, folder, form.weights, allow_pickle=allow_pickle, present=present)
        layout, weights = known.layouts.read(name, form, paths)
    parts, extras, layout = known.tensors(name, form, config, layout)
    files = (config_file, *paths.tensors, *([paths.shard_index] if paths.shard_index else []))
    return Adapter(name, folder, form, config, config_text, parts, extras, files, layout, weights, known.pool)


def distinct_parts(adapters: Iterable[Adapter]) -> list[tuple[dict[str, Part], int]]:
    """The parts that adapters have, in order, and how many adapters share each."""
    parts = {id(adapter.parts): adapter.parts for adapter in adapters}
    counts = Counter(id(adapter.parts) for adapter in adapters)
    return [(each, counts[key]) for key, each in parts.items()]


def _sorted_out(adapter: str, form: Format, config: LoraConfig, layout: Layout) -> _Tensors:
    for key, info in layout.tensors.items():
        _refuse_empty(adapter, key, info)
    parts, layout = form.find_parts(adapter, config, layout)
    taken = {key for part in parts.values() for key in (part.key_a, part.key_b)}
    taken |= {cut.source for cut in layout.cuts.values()}
    extras = {key: layout.tensors[key] for key in sorted(layout.tensors) if key not in taken}
    form.check_extras(adapter, config, parts, extras)
    return parts, extras, layout


def _refuse_empty(adapter: str, key: str, info: TensorInfo) -> None:
    """DeepSpeed ZeRO-3 spreads parameters over all processes, and what it has not gathered is saved as shape [0]."""
    if info.shape == (0,) and info.dtype in FLOATS:
        raise AdapterError(
            adapter,
            f"tensor {key} is empty, of shape [0]: DeepSpeed ZeRO-3 saved it without gathering the parameters",
            "save it again with zero3_save_16bit_model (Accelerate) or stage3_gather_16bit_weights_on_model_save",
        )

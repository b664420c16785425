"""A model that serves the adapters of a bundle: y += ΔŴ x behind every target module, each row with its own adapter.

Updates are applied by forward hooks. The weights of the model are never changed, and no adapter is copied or merged, so
that it takes no time to switch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ..base.errors import UsageError
from ..bundle.choose import refuse_text, unknown
from ..model.hooks import input_of
from .resident import NONE, Batch, Resident

NO_ADAPTER: Literal["__base__"] = "__base__"
"""In place of a name: the base model alone. PEFT has the same; None says it, too."""

_TOKENS = 64  # of every sequence, that an embedding looks up at a time: each is as long as the vocabulary then
_INPUTS = ("inputs", "input_ids", "inputs_embeds", "input_features")  # of generate(), one of which has the sequences


class _Rows(NamedTuple):
    """The rows of a block."""

    sequences: int
    batch: Batch | None
    """None for nothing but the base model."""


# Of this thread or task: what one of them asks of a model must not be answered with the adapters of another.
_rows: ContextVar[Mapping[Served, _Rows]] = ContextVar("rows", default=MappingProxyType({}))
# By layer. Its hooks keep what is attached to it, which keeps the layer: a reference from here would for ever.
_attached: WeakKeyDictionary[nn.Module, ref[Served]] = WeakKeyDictionary()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _refuse_compiling() -> None:
    """This is called when a hook is compiled, and not when it would run.

    What is compiled for one layer is used for others, whether they have hooks or not: adapters would go missing.
    """
    raise UsageError("a model that a bundle is attached to cannot be compiled")


def attached_to(model: nn.Module) -> list[Served]:
    """What is attached to ``model``, or to models that are part of it."""
    found = [_attached[layer]() for layer in model.modules() if layer in _attached]
    return [served for served in dict.fromkeys(found) if served is not None]


class Served:
    """A model to which a bundle is attached, see `attach`. As a context manager it detaches at the end."""

    def __init__(self, model: nn.Module, resident: Resident, device: torch.device) -> None:
        """``resident`` is on ``device`` and its modules fit ``model``. Raises UsageError if one of these has hooks."""
        layers = {name: model.get_submodule(name) for name in resident.modules}
        if any(layer in _attached for layer in layers.values()):
            raise UsageError(
                "a bundle is attached to this model already",
                "detach it first: lorazip_core.serving.attach.detach(model)",
            )
        self.model: Any = model
        self._resident = resident
        self._device = device
        self._handles = []
        for name, layer in layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name), with_kwargs=True))
        self._layers = list(layers.values())
        _attached.update(dict.fromkeys(self._layers, ref(self)))

    @property
    def names(self) -> list[str]:
        """The adapters that are served, in the order of the bundle."""
        return list(self._resident.rows)

    @property
    def nbytes(self) -> int:
        """Bytes that the device holds of all adapters, besides the model."""
        return self._resident.nbytes

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within the block, sequence i of a batch is answered with the adapter ``names``[i]; None for the base model.

        A batch may have a multiple of so many sequences: each name is then for several that follow each other, as
        beams and return sequences do. Without a block, and in other threads, the model is the base model. Raises
        UsageError for a name that is not served; so does the model for a batch that is no multiple.
        """
        if not self._handles:
            raise UsageError("the bundle is detached from this model")
        token = _rows.set({**_rows.get(), self: self._read(names)})
        try:
            yield
        finally:
            _rows.reset(token)

    def generate(self, *args: Any, adapter_names: Sequence[str | None], **options: Any) -> Any:
        """``model.generate`` with one adapter for each of its inputs, as in `rows`."""
        refuse_text(adapter_names)
        given = next((options[name] for name in _INPUTS if options.get(name) is not None), *args[:1] or (None,))
        if given is not None and len(given) != len(adapter_names):
            raise UsageError(f"{len(adapter_names)} adapter names for {len(given)} inputs")
        with self.rows(adapter_names):
            return self.model.generate(*args, **options)

    def detach(self) -> None:
        """Leave the model as it was before."""
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            del _attached[layer]
        self._handles, self._layers = [], []

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _read(self, names: Sequence[str | None]) -> _Rows:
        refuse_text(names)
        rows = [self._row(name) for name in names]
        if not rows:
            raise UsageError("no rows: name an adapter, or None, for each sequence")
        if all(row == NONE for row in rows):
            return _Rows(len(rows), None)
        return _Rows(len(rows), self._resident.batch(torch.tensor(rows, device=self._device)))

    def _row(self, name: str | None) -> int:
        if name is None or name == NO_ADAPTER:
            return NONE
        if name not in self._resident.rows:
            raise unknown(name, self._resident.rows, "what is served", "Served.names")
        return self._resident.rows[name]

    def _hook(self, name: str) -> Any:
        def hook(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], y: Tensor) -> Tensor | None:
            if torch.compiler.is_compiling():
                _refuse_compiling()
            rows = _rows.get().get(self)
            if rows is None:
                return None
            x, batch = input_of(name, given, named), rows.batch
            if x.shape[0] % rows.sequences:
                raise UsageError(
                    f"{name}: a batch of {x.shape[0]} is no multiple of the {rows.sequences} rows",
                    "name an adapter, or None, for each sequence",
                )
            if batch is None:
                return None
            with torch.autocast(self._device.type, enabled=False):  # which would round what is summed in float32
                if isinstance(layer, nn.Embedding):
                    # Some models (Gemma's) multiply what they look up, and so the update.
                    update = self._looked_up(name, x, batch, y.dtype) * getattr(layer, "embed_scale", 1.0)
                else:  # a Linear, or a Conv1D, whose weight is transposed: x [..., d_in] and y [..., d_out] are alike
                    update = self._resident.apply(name, x.to(self._device), batch)
                return y + update.to(y)

        return hook

    def _looked_up(self, name: str, tokens: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor:
        """Of a table [num, dim], whose update is transposed: token i [b, t] is the unit vector e_i of [num]."""
        num, tokens = self._resident.modules[name].size.d_in, tokens.to(self._device)
        pieces = [tokens[:, start : start + _TOKENS] for start in range(0, tokens.shape[1], _TOKENS)]
        units = (nn.functional.one_hot(piece, num).to(dtype) for piece in pieces)
        return torch.cat([self._resident.apply(name, unit, batch) for unit in units], 1)

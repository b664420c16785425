"""Which adapters of a bundle can be served exactly: those that are nothing but updates of modules an engine takes.

This is told from the manifest, the configurations and the names of tensors; no weights are read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from msgspec import UNSET
from torch import Tensor

from ..adapter.formats.registry import recognise
from ..base.errors import Unsupported
from ..bundle.manifest import AdapterEntry, ModuleEntry
from ..bundle.reader import Bundle

Takes = Literal["linear", "conv", "embedding", "parameter"]
"""A kind of module; a parameter is one that is adapted without the module that holds it, an expert most of all."""

_WORDS: dict[Takes, str] = {
    "linear": "a linear layer",
    "conv": "a convolution",
    "embedding": "an embedding",
    "parameter": "of a parameter and no module",
}
_NAMED = 3  # adapters in a message
_OTHERS = "leave them out: name the others with only=[…]"


def unservable(
    bundle: Bundle, takes: Collection[Takes], adapters: Sequence[AdapterEntry] | None = None
) -> dict[str, str]:
    """Why ``adapters`` cannot be served exactly by an engine that ``takes`` modules of these kinds, by their names.

    Without ``adapters`` all of the bundle are asked about. Those that are not named can be served, if the model has
    their modules, and the same `base_weights`. Raises BundleDamaged for a damaged file of configurations or extras.
    """
    reasons: dict[tuple[object, ...], str | None] = {}  # many adapters are alike in all that decides
    found = {}
    for adapter in bundle.manifest.adapters if adapters is None else adapters:
        key = adapter.config, adapter.extras, adapter.module_set
        if key not in reasons:
            reasons[key] = _reason(bundle, adapter, takes)
        if reason := reasons[key]:
            found[adapter.name] = reason
    return found


def refuse(adapters: Sequence[AdapterEntry], reasons: Mapping[str, str], *, hint: str = _OTHERS) -> None:
    """Raise Unsupported if some of ``adapters`` have ``reasons`` why they cannot be served exactly."""
    refused = [f"{adapter.name!r}: {reasons[adapter.name]}" for adapter in adapters if adapter.name in reasons]
    if refused:
        more = "; …" if refused[_NAMED:] else ""
        raise Unsupported(
            f"{len(refused)} of {len(adapters)} adapters cannot be served exactly"
            f" ({'; '.join(refused[:_NAMED])}{more})",
            hint,
        )


def base_weights(bundle: Bundle, adapter: AdapterEntry) -> dict[str, Tensor]:
    """The weights that an adapter brings along with a LoRA on an embedding, by the modules they are of.

    They are those of its base model, and say nothing of the adapter unless the model at hand has others. Raises
    BundleDamaged.
    """
    if adapter.extras is None:
        return {}
    form, _ = recognise(adapter.name, bundle.config_text(adapter))
    found = form.base_weights(_extras(bundle, adapter))
    return {module: bundle.tensor(adapter.extras, name) for module, name in found.items()}


def _extras(bundle: Bundle, adapter: AdapterEntry) -> list[str]:
    return [] if adapter.extras is None else bundle.names(adapter.extras)


def _reason(bundle: Bundle, adapter: AdapterEntry, takes: Collection[Takes]) -> str | None:
    form, config = recognise(adapter.name, bundle.config_text(adapter))
    if more := form.besides(config, _extras(bundle, adapter)):
        return more
    wrong = next((module for module in bundle.modules(adapter) if _kind(module) not in takes), None)
    return None if wrong is None else f"{wrong.name} is {_WORDS[_kind(wrong)]}, which is not served"


def _kind(module: ModuleEntry) -> Takes:
    return module.kind if module.parameter is UNSET else "parameter"

"""Which adapters of a bundle vLLM serves exactly with this plugin: those that are updates of linear layers alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from ..base.errors import LocalError
from ..bundle.manifest import AdapterEntry
from ..bundle.reader import Bundle
from ..serving.servable import Takes, refuse, unservable

TAKES: frozenset[Takes] = frozenset({"linear"})
"""The kinds of modules that are served."""
_HINT = "make a bundle without them"
_HEAD = "lm_head"


def check_adapters(bundle: Bundle, adapters: Sequence[AdapterEntry] | None = None) -> None:
    """Raise Unsupported, with the reasons, if some of ``adapters``, or of all, cannot be served exactly."""
    chosen = bundle.manifest.adapters if adapters is None else adapters
    refuse(chosen, _of_other_layers(bundle, chosen) | unservable(bundle, TAKES, chosen), hint=_HINT)


def _of_other_layers(bundle: Bundle, adapters: Sequence[AdapterEntry]) -> dict[str, str]:
    """The adapters with modules that are linear layers, but none of vLLM's."""
    found = {}
    for adapter in adapters:
        for module in bundle.modules(adapter):
            parts = module.name.split(".")
            if parts[-1] == _HEAD:
                found[adapter.name] = f"{module.name} is the head of the model, which is not served"
            elif "experts" in parts:
                found[adapter.name] = f"{module.name} is of an expert, which is not served"
    return found


def names_taken(names: Iterable[str], adapters: Collection[str]) -> str | None:
    """That the base model has the name of one of ``adapters`` among its ``names``, in words; None if it has not.

    vLLM would answer with the base model whoever asks for that adapter.
    """
    taken = next((name for name in names if name in adapters), None)
    return None if taken is None else f"{taken} is the name of an adapter and of the base model"


def entry(bundle: Bundle, name: str) -> AdapterEntry:
    """The adapter of this name. Raises LocalError if there is none."""
    for adapter in bundle.manifest.adapters:
        if adapter.name == name:
            return adapter
    raise LocalError(f"there is no adapter {name} in {bundle.path}")

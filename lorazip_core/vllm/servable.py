"""Which adapters of a bundle vLLM serves exactly with this plugin: those that are updates of linear layers alone."""

from __future__ import annotations

from collections.abc import Sequence

from ..base.errors import LocalError
from ..bundle.manifest import AdapterEntry
from ..bundle.reader import Bundle
from ..serving.servable import Takes, refuse, unservable

TAKES: frozenset[Takes] = frozenset({"linear"})
"""The kinds of modules that are served."""
_HINT = "make a bundle without them"


def check_adapters(bundle: Bundle, adapters: Sequence[AdapterEntry] | None = None) -> None:
    """Raise Unsupported, with the reasons, if some of ``adapters``, or of all, cannot be served exactly."""
    chosen = bundle.manifest.adapters if adapters is None else adapters
    refuse(chosen, unservable(bundle, TAKES, chosen), hint=_HINT)


def entry(bundle: Bundle, name: str) -> AdapterEntry:
    """The adapter of this name. Raises LocalError if there is none."""
    for adapter in bundle.manifest.adapters:
        if adapter.name == name:
            return adapter
    raise LocalError(f"there is no adapter {name} in {bundle.path}")

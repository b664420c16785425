"""Put a bundle on a loaded Transformers model, so that it serves all adapters at once: `attach`, and `detach`.

Transformers need not be there: any model will do whose target modules are Linear, Conv1D or Embedding layers of the
names that the bundle has, and have the sequences of a batch in the first dimension of their inputs.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import nn

from ..base.device import find_device
from ..base.errors import UsageError
from ..bundle.choose import choose
from ..bundle.contradictions import refuse_contradictions
from ..bundle.manifest import AdapterEntry
from ..bundle.reader import Bundle
from ..model.fitting import misfit
from .resident import Resident
from .servable import Takes, base_weights, refuse, unservable
from .served import Served, attached_to

TAKES: frozenset[Takes] = frozenset({"linear", "embedding"})
"""The kinds of modules that are served."""


def attach(
    model: nn.Module,
    bundle: Bundle | str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    only: Collection[str] | None = None,
) -> Served:
    """Have ``model`` serve the adapters of a bundle until `Served.detach`, or `detach` of the model; for inference.

    They are held on ``device`` ("auto", "cpu", "cuda" or "cuda:N"), by default that of the first of the model's
    parameters; ``only`` some adapters, by a list of their names or patterns of these. Raises UsageError for a model
    that is not the one that the adapters are for, that is compiled or that has a bundle already, and for a name that
    is none; LocalError for a device that is not there; Unsupported, with the reasons, if an adapter cannot be served
    exactly; BundleDamaged for a damaged bundle.
    """
    where = None if device is None else find_device(str(device))
    bundle = bundle if isinstance(bundle, Bundle) else Bundle(Path(bundle))
    refuse_contradictions(bundle.path, bundle.manifest)
    if only is not None and not only:
        raise UsageError("only=[] leaves no adapter to serve")
    _refuse_compiled(model)
    adapters = choose(bundle, only or ())
    refuse(adapters, unservable(bundle, TAKES, adapters))
    modules = {module.name: module.module for adapter in adapters for module in bundle.modules(adapter)}
    if reason := misfit(model, modules.values()):
        raise UsageError(f"{bundle.path} does not fit this model: {reason}")
    refuse(adapters, _of_other_weights(model, bundle, adapters) | _of_experts(bundle, adapters))
    where = where or next(model.parameters()).device
    return Served(model, Resident.of(bundle, where, adapters), where)


def detach(model: nn.Module) -> None:
    """Leave ``model`` as it was before a bundle was attached to it, whoever has the `Served` of it, if anyone."""
    for served in attached_to(model):
        served.detach()


def _refuse_compiled(model: nn.Module) -> None:
    """What is compiled does not see hooks."""
    for module in model.modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise UsageError("the model is compiled, and would pass over adapters", "attach to one that is not")


def _of_other_weights(model: nn.Module, bundle: Bundle, adapters: Sequence[AdapterEntry]) -> dict[str, str]:
    """The adapters that bring weights along which the model has otherwise: embeddings of more tokens, most of all."""
    differing: dict[str | None, str | None] = {}  # by the file, which adapters share
    for adapter in adapters:
        if adapter.extras not in differing:
            weights = base_weights(bundle, adapter)
            differing[adapter.extras] = next(
                (name for name, saved in weights.items() if not _has(model, name, saved)), None
            )
    return {
        adapter.name: f"{module} is not in the model as the adapter has it"
        for adapter in adapters
        if (module := differing[adapter.extras])
    }


def _has(model: nn.Module, name: str, saved: torch.Tensor) -> bool:
    weight = getattr(dict(model.named_modules()).get(name), "weight", None)
    return weight is not None and torch.equal(saved.to(weight.dtype), weight.detach().cpu())


def _of_experts(bundle: Bundle, adapters: Sequence[AdapterEntry]) -> dict[str, str]:
    """The adapters with modules that get some of the tokens, and do not know whose they are."""
    found = {}
    for adapter in adapters:
        experts = [module.name for module in bundle.modules(adapter) if "experts" in module.name.split(".")]
        if experts:
            found[adapter.name] = f"{experts[0]} is of an expert, which gets tokens without their rows"
    return found

"""An update on the model, for as long as a block lasts: y += (x Aᵀ) Bᵀ behind every target module, by forward hooks.

The weights of the model stay as they are, and no dense ΔW is formed. That is how PEFT computes, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..base.errors import UsageError
from ..maths.factored import Factors

Updates = Mapping[str, Factors]
"""By target module, B [d_out, r] with its scale and A [r, d_in], so that ΔW = B A."""


def on_device(updates: Updates, device: torch.device, dtype: torch.dtype) -> dict[str, Factors]:
    """The updates where a model computes and as it does."""
    return {name: (b.to(device, dtype), a.to(device, dtype)) for name, (b, a) in updates.items()}


@contextmanager
def applied(model: nn.Module, updates: Updates) -> Iterator[None]:
    """``model`` with ``updates`` in the block. Each has to fit, see `fitting.misfit`."""
    with ExitStack() as stack:
        for name, (b, a) in updates.items():
            module = model.get_submodule(name)
            make = _embedding if isinstance(module, nn.Embedding) else _linear
            stack.callback(module.register_forward_hook(make(name, b, a), with_kwargs=True).remove)
        yield


def input_of(name: str, given: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """The input of a layer, from the arguments of a call of it: the first of them, or the only one by its name.

    Raises UsageError for a call that does not tell, with the ``name`` of the layer.
    """
    if given:
        return cast("Tensor", given[0])
    if len(named) != 1:
        raise UsageError(
            f"{name} was called with {', '.join(named) or 'nothing'}: its input has to be the first argument"
        )
    return cast("Tensor", next(iter(named.values())))


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]


def _linear(name: str, b: Tensor, a: Tensor) -> Hook:
    """Of a Linear or a Conv1D, whose weight is transposed: x [..., d_in] and y [..., d_out] are the same."""

    def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], y: Tensor) -> Tensor:
        return y + (input_of(name, given, named).to(a.dtype) @ a.mT @ b.mT).to(y.dtype)

    return hook


def _embedding(name: str, b: Tensor, a: Tensor) -> Hook:
    """Of a table [num, dim], whose update is transposed: token i gets column i of A.

    Some models (Gemma's) multiply what they look up, and so the update: ``embed_scale``.
    """

    def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], y: Tensor) -> Tensor:
        looked_up = nn.functional.embedding(input_of(name, given, named), a.mT) @ b.mT
        return y + (looked_up * getattr(module, "embed_scale", 1.0)).to(y.dtype)

    return hook

"""An update on the model, for as long as a block lasts: y += (x Aᵀ) Bᵀ behind every target module, by forward hooks.

The weights of the model stay as they are, and no dense ΔW is formed. That is how PEFT computes, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
            stack.callback(module.register_forward_hook(make(b, a)).remove)
        yield


Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]


def _linear(b: Tensor, a: Tensor) -> Hook:
    """Of a Linear or a Conv1D, whose weight is transposed: x [..., d_in] and y [..., d_out] are the same."""

    def hook(module: nn.Module, given: tuple[Any, ...], y: Tensor) -> Tensor:
        return y + (given[0].to(a.dtype) @ a.mT @ b.mT).to(y.dtype)

    return hook


def _embedding(b: Tensor, a: Tensor) -> Hook:
    """Of a table [num, dim], whose update is transposed: token i gets column i of A.

    Some models (Gemma's) multiply what they look up, and so the update: ``embed_scale``.
    """

    def hook(module: nn.Module, given: tuple[Any, ...], y: Tensor) -> Tensor:
        looked_up = nn.functional.embedding(given[0], a.mT) @ b.mT
        return y + (looked_up * getattr(module, "embed_scale", 1.0)).to(y.dtype)

    return hook

"""What goes into the target modules of a model: which of them share an input, and its second moments."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .fitting import shape_of
from .hooks import input_of


def linear_modules(model: Any) -> list[str]:
    """The names of all layers with an update of x, in the order of the model; the head, which makes logits, is none."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if module is not head and not isinstance(module, nn.Embedding) and shape_of(module) is not None
    ]


def sharing(model: nn.Module, modules: Sequence[str], run: Callable[[], object]) -> list[list[str]]:
    """``modules`` in lists of those that get the very same tensor while ``run`` runs the model, once.

    One that is not called then, or more than once, is in a list of its own.
    """
    held: list[Tensor] = []  # an input that is gone could leave its id to another one
    calls: Counter[str] = Counter()
    of_input: defaultdict[int, list[str]] = defaultdict(list)

    def seen(name: str, x: Tensor) -> None:
        held.append(x)
        calls[name] += 1
        of_input[id(x)].append(name)

    with watched(model, modules, seen):
        run()
    once = [[name for name in names if calls[name] == 1] for names in of_input.values()]
    groups = {names[0]: names for names in once if names}
    together = {name for names in groups.values() for name in names}
    return [groups.get(name, [name]) for name in modules if name in groups or name not in together]


class Sums(NamedTuple):
    """Σ x xᵀ [d_in, d_in] in float32 on the device of the model, and the number of vectors x."""

    total: Tensor
    vectors: list[int]


@contextmanager
def summing(model: nn.Module, modules: Sequence[str]) -> Iterator[dict[str, Sums]]:
    """By module, the sums over all that goes into it while the block runs the model; nothing may be padding.

    They take d_in² · 4 bytes a module.
    """
    sums: dict[str, Sums] = {}

    def seen(name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        if name not in sums:
            sums[name] = Sums(torch.zeros(rows.shape[1], rows.shape[1], device=x.device), [0])
        sums[name].total.addmm_(rows.mT, rows)
        sums[name].vectors[0] += len(rows)

    with watched(model, modules, seen):
        yield sums


@contextmanager
def watched(model: nn.Module, modules: Sequence[str], seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``seen`` with a module's name and its input x [..., d_in] whenever one of ``modules`` is run."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda module, given, named: seen(name, input_of(name, given, named))

    with ExitStack() as stack:
        for name in modules:
            handle = model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield

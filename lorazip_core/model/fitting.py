"""Whether an adapter can be put on a model: each module is there, in its shape, and of a kind that `hooks` knows."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..adapter.module import Module

Shape = tuple[int, int]

_NAMED = 3


def shape_of(module: nn.Module) -> Shape | None:
    """d_out and d_in of a layer whose update can be applied; None for any other layer.

    A Linear of any make says so itself; Transformers' Conv1D has its weight the other way round.
    """
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    d_out, d_in = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(d_out, int) and isinstance(d_in, int):
        return d_out, d_in
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and weight is not None and weight.ndim == 2:
        return int(weight.shape[1]), int(weight.shape[0])
    return None


def misfit(model: nn.Module, modules: Iterable[Module]) -> str | None:
    """Why an adapter of these ``modules`` cannot be put on ``model``; None if it can be."""
    there = dict(model.named_modules())
    missing: list[str] = []
    for module in modules:
        if module.parameter is not None:
            return f"{module.name} is a parameter of the model and no module, to which no update can be applied"
        if module.name not in there:
            missing.append(module.name)
            continue
        layer = there[module.name]
        shape = shape_of(layer)
        if shape is None or (module.kind == "embedding") != isinstance(layer, nn.Embedding) or module.kind == "conv":
            kind = type(layer).__name__
            return f"module {module.name} is {module.shape}, and {kind} in the model, to which no such update applies"
        if shape != (module.d_out, module.d_in):
            return f"module {module.name} is {module.shape}, but in the model {list(shape)}: is it its base model?"
    if missing:
        more = ", …" if len(missing) > _NAMED else ""
        return f"{len(missing)} of its modules are not in the model: {', '.join(missing[:_NAMED])}{more}"
    return None

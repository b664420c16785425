"""A target module: its name, its shape, and the names of its two factors in a PEFT file."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

from .names import PREFIX

Kind = Literal["linear", "conv", "embedding"]

_FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB])(?:\.weight)?)")


class Parameter(NamedTuple):
    """What a module is of a parameter of the base model: the matrix itself, or one of the experts stacked in it.

    ``name`` is what the module that holds the parameter calls it (``gate_up_proj``).
    """

    name: str
    expert: int = 0
    experts: int = 1


class Module(NamedTuple):
    """A target module of the base model, with the shape [d_out, d_in] of its update.

    ``linear`` covers transformers' Conv1D as well (``fan_in_fan_out`` transposes the base weight, not the factors). A
    ``conv`` layer is flattened to d_in = channels · ∏kernel. An ``embedding`` table [num, dim] counts as its
    transpose, d_out = dim and d_in = num, which is how PEFT stores the factors. A ``parameter`` that is adapted without
    its module (``target_parameters``) is ``linear``: one module for a matrix, named as the parameter is, and one for
    each of its experts, named as the parameter is and by a number.
    """

    name: str
    kind: Kind
    d_out: int
    d_in: int
    kernel: tuple[int, ...] = ()
    parameter: Parameter | None = None

    @property
    def target(self) -> str:
        """What a configuration calls it: its name, or for an expert that of the parameter."""
        if self.parameter is None or self.parameter.experts == 1:
            return self.name
        return self.name.removesuffix(f".{self.parameter.expert}")

    @property
    def keys(self) -> tuple[str, str]:
        """The names of B and A in a PEFT weights file."""
        if self.kind == "embedding":
            return f"{PREFIX}{self.name}.lora_embedding_B", f"{PREFIX}{self.name}.lora_embedding_A"
        return f"{PREFIX}{self.name}.lora_B.weight", f"{PREFIX}{self.name}.lora_A.weight"

    @property
    def shape(self) -> str:
        kernel = f", kernel {'x'.join(map(str, self.kernel))}" if self.kernel else ""
        experts = f", one of {self.parameter.experts} experts" if self.parameter and self.parameter.experts > 1 else ""
        return f"{self.kind} [{self.d_out}, {self.d_in}]{kernel}{experts}"

    def to_peft(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """B [d_out, r] and A [r, d_in] in the shapes that PEFT gives them: a convolution's A regains its kernel."""
        if self.kind != "conv":
            return b, a
        channels = self.d_in // math.prod(self.kernel)
        return b.reshape(*b.shape, *(1 for _ in self.kernel)), a.reshape(a.shape[0], channels, *self.kernel)


def split_key(key: str) -> tuple[str, str, bool] | None:
    """(module name, "A" or "B", whether it is an embedding's) of a factor's tensor name, or None for any other name."""
    match = _FACTOR.fullmatch(key)
    if match is None:
        return None
    name, linear, embedding = match.groups()
    return name, linear or embedding, embedding is not None


def module_name(stored: str) -> str | None:
    """The module of a factor's tensor in its name as a file has it, training wrappers included."""
    _, prefix, inner = stored.partition(PREFIX)
    return inner.rpartition(".lora_")[0] if prefix else None


def module_of(name: str, embedding: bool, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> Module:
    """The module whose factors have these shapes in a PEFT file.

    Raises ValueError, with the two shapes, when no layer has such factors or when their ranks differ.
    """
    kernel = a_shape[2:]
    if len(a_shape) < 2 or len(b_shape) != len(a_shape) or any(size != 1 for size in b_shape[2:]):
        raise ValueError(f"lora_A {list(a_shape)} and lora_B {list(b_shape)} do not belong to one layer")
    if a_shape[0] != b_shape[1]:
        grouped = ": a grouped convolution, whose update is not B A?" if kernel else ""
        raise ValueError(
            f"lora_A {list(a_shape)} has rank {a_shape[0]}, lora_B {list(b_shape)} has rank {b_shape[1]}{grouped}"
        )
    if 0 in a_shape + b_shape:
        raise ValueError(f"lora_A {list(a_shape)} and lora_B {list(b_shape)}: a dimension is zero")
    kind: Kind = "embedding" if embedding else "conv" if kernel else "linear"
    return Module(name, kind, b_shape[0], math.prod(a_shape[1:]), kernel)

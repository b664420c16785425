"""A target module, and what an adapter has for it."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["linear", "conv", "embedding"]


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
    transpose, d_out = dim and d_in = num. A ``parameter`` that is adapted without the module that holds it is
    ``linear``: one module for a matrix, named as the parameter is, and one for each of its experts, named as the
    parameter is and by a number.
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
    def shape(self) -> str:
        kernel = f", kernel {'x'.join(map(str, self.kernel))}" if self.kernel else ""
        experts = f", one of {self.parameter.experts} experts" if self.parameter and self.parameter.experts > 1 else ""
        return f"{self.kind} [{self.d_out}, {self.d_in}]{kernel}{experts}"


class Part(NamedTuple):
    """What one adapter has for one module: rank, scale, and where the two factors are, by their names in the layout."""

    module: Module
    rank: int
    scale: float
    key_b: str
    key_a: str

    @property
    def parameters(self) -> int:
        """Elements of both factors."""
        return self.rank * (self.module.d_out + self.module.d_in)

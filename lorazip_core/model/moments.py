"""The second moments of the inputs of modules, H = E[x xᵀ], as a file: few numbers for each distinct input.

H is kept as its diagonal, which is exact but for float32, and its leading directions: VᵀV off the diagonal. A file is a
safetensors file without metadata. For the modules a, b and c, which get the same input, it has

- ``a,b,c:diagonal`` F32 [d_in], E[x²] of every entry of x;
- ``a,b,c:directions`` BF16 [k, d_in], V;
- ``a,b,c:vectors`` I64 [], the number of x;

and besides ``lorazip.moments`` I64 [], the version of this form, 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..base.errors import Unsupported, UsageError
from ..base.filesystem import naming
from ..maths.weighting import leading_directions

RANK = 32
"""Directions that are kept unless told otherwise: on SmolLM2-135M as good as all (docs/method.md)."""

_HINT = "name a file that 'lorazip calibrate' wrote"
_FORMAT, _VERSION = "lorazip.moments", 1


class Moment(NamedTuple):
    """The second moment of one input."""

    modules: tuple[str, ...]
    diagonal: Tensor
    """[d_in], float32."""
    directions: Tensor
    """[k, d_in], bfloat16."""
    vectors: int

    @classmethod
    def of_sum(cls, modules: Iterable[str], total: Tensor, vectors: int, rank: int) -> Moment:
        """Of Σ x xᵀ [d_in, d_in] over so many x."""
        mean = total.double() / vectors
        directions = leading_directions(mean, rank).to(torch.bfloat16)
        return cls(tuple(modules), mean.diagonal().float().cpu(), directions.cpu(), vectors)


def to_bytes(moments: Iterable[Moment]) -> bytes:
    """The file of some moments; the same ones give the same bytes."""
    tensors = {_FORMAT: torch.tensor(_VERSION)}
    for each in moments:
        name = ",".join(each.modules)
        tensors[f"{name}:diagonal"] = each.diagonal.contiguous()
        tensors[f"{name}:directions"] = each.directions.contiguous()
        tensors[f"{name}:vectors"] = torch.tensor(each.vectors)
    return bytes(save(tensors))


class Moments:
    """A file of `lorazip calibrate`, opened; tensors are read when they are asked for."""

    def __init__(self, path: Path, handle: Any, names: dict[str, str]) -> None:
        self.path = path
        self._handle = handle
        self._names = names
        """By module, all modules with its input as the file has them."""

    @classmethod
    def open(cls, path: Path) -> Moments:
        """Raises UsageError for what is no file or one of another kind, Unsupported for another version."""
        if not path.is_file():
            raise UsageError(f"{path} is not a file", _HINT)
        with naming(path):
            try:
                handle: Any = safe_open(path, framework="pt")
                names = list(handle.keys())
            except SafetensorError as error:
                raise UsageError(f"{path} is no file of moments: {error}", _HINT) from None
        if _FORMAT not in names:
            raise UsageError(f"{path} is no file of moments: it has no tensor {_FORMAT}", _HINT)
        marked = handle.get_tensor(_FORMAT)
        if marked.shape != () or marked.dtype != torch.int64:
            raise UsageError(f"{path} is no file of moments: its {_FORMAT} is no version", _HINT)
        version = int(marked)
        if version != _VERSION:
            raise Unsupported(f"{path} is version {version} of moments, this lorazip reads {_VERSION}")
        together = [name.removesuffix(":diagonal") for name in names if name.endswith(":diagonal")]
        return cls(path, handle, {module: joined for joined in together for module in joined.split(",")})

    @property
    def modules(self) -> list[str]:
        """All modules that it has the moments of, by name."""
        return sorted(self._names)

    def moment(self, module: str) -> Moment | None:
        """What is stored of the input of a module; None if nothing is."""
        name = self._names.get(module)
        if name is None:
            return None
        try:
            diagonal, directions, vectors = (
                self._handle.get_tensor(f"{name}:{part}") for part in ("diagonal", "directions", "vectors")
            )
        except SafetensorError as error:
            raise UsageError(f"{self.path} is damaged: {error}", _HINT) from None
        if diagonal.ndim != 1 or directions.shape[1:] != diagonal.shape or vectors.shape != ():
            raise UsageError(f"{self.path} is damaged: the tensors of {name} do not fit each other", _HINT)
        return Moment(tuple(name.split(",")), diagonal, directions, int(vectors))

"""An adapter out of a file that it shares with others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ..schemes.joined import Joined


class Unpacked(Mapping[str, dict[str, "Tensor"]]):
    """The own tensors of an adapter: by module, and there by suffix. They are views of ``joined`` ones."""

    def __init__(self, modules: Sequence[str], joined: Mapping[str, Joined]) -> None:
        self.joined = joined
        self._places = {module: place for place, module in enumerate(modules)}

    def __getitem__(self, module: str) -> dict[str, Tensor]:
        place = self._places[module]
        return {suffix: joined[place] for suffix, joined in self.joined.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def place(self, module: str) -> int:
        """That of a module among the tensors of ``joined``."""
        return self._places[module]

    @property
    def size_bytes(self) -> int:
        """Of all tensors."""
        return sum(joined.flat.nbytes for joined in self.joined.values())

"""What the reader asks of a form in which adapters are stored, and what it is told of the configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
from torch import Tensor

from ...base.errors import AdapterError
from ..layout import Layout, Names, TensorInfo
from ..module import Part


class NotLora(AdapterError):
    """A configuration of another method, or of none that is known."""


class LoraConfig(msgspec.Struct, frozen=True):
    """The fields that lorazip needs, with PEFT's defaults for missing ones; ``raw`` is the whole object."""

    r: int
    lora_alpha: float
    base_model: str | None
    use_rslora: bool
    use_dora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_parameters: tuple[str, ...]
    raw: dict[str, Any]

    def rank(self, module: str) -> int:
        """The rank that the configuration promises for a module."""
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, module), self.r)

    def scale(self, module: str, rank: int) -> float:
        """alpha/r, or alpha/√r with rsLoRA, patterns included."""
        alpha = self.alpha_pattern.get(_pattern_key(self.alpha_pattern, module), self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def has_patterns(self) -> bool:
        """Whether modules may have ranks or scales of their own."""
        return bool(self.rank_pattern or self.alpha_pattern)

    @property
    def largest_rank(self) -> int | None:
        """The largest rank that it promises for any module; None for DoRA, whose updates have a higher rank."""
        return None if self.use_dora else max(self.r, *self.rank_pattern.values(), 1)

    @property
    def deciding(self) -> object:
        """All of it that decides what the tensors of one layout are, and whether they can be used; to be compared."""
        patterns = (tuple(self.rank_pattern.items()), tuple(self.alpha_pattern.items()))
        targets = (self.target_parameters, str(self.raw.get("target_modules"))) if self.target_parameters else None
        return self.r, self.lora_alpha, self.use_rslora, self.use_dora, patterns, targets


def _pattern_key(patterns: Mapping[str, Any], module: str) -> str:
    """PEFT's rule: the first pattern that matches the end of the name, at a dot or the whole of it."""
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", module):
            return pattern
    return module


class WeightNames(NamedTuple):
    """The names of files with weights: one with all, or else an index of shards, or else a pickle."""

    whole: str
    shard_index: str
    pickle: str
    prefixes: tuple[str, ...]
    """What the name of any file with weights of the adapter itself begins with."""

    @property
    def names(self) -> tuple[str, str, str]:
        return self.whole, self.shard_index, self.pickle


@dataclass(frozen=True, eq=False)
class Format:
    """One form. Functions are given the name of the adapter first, for the AdapterError that they raise.

    Whatever the form, tensors go by the names that PEFT would give them, which are those in a bundle: ``ordinary``.
    """

    weights: WeightNames
    recognises: Callable[[dict[str, Any]], bool]
    """Whether a configuration, the object in ``adapter_config.json``, is of this form."""
    parse_config: Callable[[str, dict[str, Any]], LoraConfig]
    """What of the configuration decides the update. Raises for every variant whose update is not scale · B A."""
    ordinary_names: Callable[[str, Sequence[str]], Names]
    """The ordinary names of all tensors, out of those in the files. Raises where that cannot be told."""
    find_parts: Callable[[str, LoraConfig, Layout], tuple[dict[str, Part], Layout]]
    """The modules by name, in order, with the places of B and A, and the layout with what these are cut from."""
    check_extras: Callable[[str, LoraConfig, Mapping[str, Part], Mapping[str, TensorInfo]], None]
    """Look at all tensors that are no factors. Raises for one that changes the update, and for one that is missing."""
    extra: Callable[[str, Tensor, Mapping[str, Part]], Tensor]
    """Such a tensor, by its ordinary name, as a bundle has it: with the scale of its module, if that applies to it."""
    notes: Callable[[Sequence[Mapping[str, Part]]], Iterable[str]]
    """Lines for people on the modules of usable adapters, whose names may not be what they seem."""
    besides: Callable[[Mapping[str, Any], Collection[str]], str | None]
    """Why an adapter is more than its updates, from its configuration and the ordinary names of its other tensors."""
    base_weights: Callable[[Collection[str]], dict[str, str]]
    """Which of these are copies of weights of the base model, by the modules they are of."""

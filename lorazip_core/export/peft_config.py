"""The ``adapter_config.json`` of an exported adapter: the original one, and only what must differ from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..adapter.config import LoraConfig
from ..adapter.module import Module
from .target_modules import selection

# What these say of how the adapter was made (its initialisation, a backward pass) no longer holds for its factors.
_CLEARED = ("eva_config", "corda_config", "lora_ga_config", "velora_config")
# What PEFT takes for a field that is missing. No such value is added: a PEFT older than the field would refuse it.
_DEFAULTS: dict[str, Any] = {
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "init_lora_weights": True,
    "ensure_weight_tying": False,
    "loftq_config": {},
}


def own_config(original: dict[str, Any], modules: list[Module]) -> dict[str, Any]:
    """The configuration for an adapter whose factors keep their own ranks and scales: those of ``original``."""
    return _changed(original, modules, {})


def folded_config(original: dict[str, Any], ranks: Mapping[Module, int]) -> dict[str, Any]:
    """The configuration under which PEFT scales every module by 1.

    The largest rank is r and lora_alpha; modules of another rank are in rank_pattern and alpha_pattern. The experts of
    a parameter have one rank, the largest of theirs.
    """
    targets: dict[str, int] = {}
    for module, rank in ranks.items():
        targets[module.target] = max(targets.get(module.target, 0), rank)
    r = max(targets.values())
    pattern = {f"^{re.escape(target)}": rank for target, rank in sorted(targets.items()) if rank != r}
    scaling = {"r": r, "lora_alpha": r, "use_rslora": False, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    return _changed(original, list(ranks), scaling)


def gives(config: LoraConfig, ranks: Mapping[Module, int], scales: Mapping[Module, float], *, one_rank: bool) -> bool:
    """Whether ``config`` gives every module exactly its rank and scale; with ``one_rank`` without any pattern."""
    if one_rank and (config.rank_pattern or config.alpha_pattern):
        return False
    return all(
        config.rank(module.target) == rank and config.scale(module.target, rank) == scales[module]
        for module, rank in ranks.items()
    )


def _changed(original: dict[str, Any], modules: list[Module], scaling: dict[str, Any]) -> dict[str, Any]:
    # Parameters are selected by the target_parameters of the original, which has no others.
    targets = [module for module in modules if module.parameter is None]
    wanted = scaling | {"init_lora_weights": True} | selection(original, targets)
    if original.get("loftq_config"):
        wanted["loftq_config"] = {}
    if any(module.kind == "embedding" for module in modules):
        # PEFT would make the factors of a tied output layer views of the embedding's, which compression does not keep.
        wanted["ensure_weight_tying"] = False
    wanted |= dict.fromkeys(_CLEARED)
    return original | {field: value for field, value in wanted.items() if _differs(original, field, value)}


def _differs(original: dict[str, Any], field: str, value: object) -> bool:
    """Whether PEFT takes the field of ``original`` for something else than ``value``."""
    default = _DEFAULTS.get(field)
    stated = original.get(field, default)
    return (default if stated is None else stated) != value

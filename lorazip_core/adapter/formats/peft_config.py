"""PEFT's ``adapter_config.json``: what of it decides the update, what is refused, and what an export writes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from ...base.errors import AdapterError
from ..module import Module
from .format import LoraConfig, NotLora
from .names import CONFIG_NAME
from .target_modules import selection

# A set field of the left makes B A something else than the update; the right is the name of that method.
_VARIANTS = {
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow routing",
    "enable_lora": "the merged linear layout of PEFT before 0.3 (enable_lora)",
}
# What PEFT itself turns into a LoRA.
_CONVERTIBLE = {
    *("C3A", "DELORA", "FOURIERFT", "GRALORA", "LOHA", "LOKR", "MISS", "PSOFT", "RANDLORA"),
    *("TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
}
# These initialisations subtract the initial B A from the base weights, so the saved factors are no update of the base.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

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


class _Fields(msgspec.Struct):
    peft_type: str
    r: int = 8
    lora_alpha: float = 8
    base_model_name_or_path: str | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_parameters: tuple[str, ...] | None = None
    init_lora_weights: bool | str | None = None


def parse_config(adapter: str, raw: dict[str, Any]) -> LoraConfig:
    """What of it decides the update. Raises AdapterError, naming the method, for anything but plain LoRA."""
    if raw["peft_type"] != "LORA":
        raise NotLora(
            adapter, f"PEFT type {raw['peft_type']} is not supported, only LORA", _conversion(str(raw["peft_type"]))
        )
    for field, method in _VARIANTS.items():
        if raw.get(field):
            raise AdapterError(adapter, f"{method} is not supported: its update is not B A")
    try:
        fields = msgspec.convert(raw, _Fields)
    except msgspec.ValidationError as error:
        raise AdapterError(adapter, f"{CONFIG_NAME}: {error}") from None
    if str(fields.init_lora_weights).lower().startswith(_BASE_CHANGING_INITS):
        raise AdapterError(
            adapter,
            f"init_lora_weights={fields.init_lora_weights!r} changed the base weights, so B A is not the update",
            "convert it: model.save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    ranks, alphas = fields.rank_pattern or {}, fields.alpha_pattern or {}
    finite = [fields.lora_alpha, *alphas.values()]
    if fields.r < 1 or any(rank < 1 for rank in ranks.values()) or not all(map(math.isfinite, finite)):
        raise AdapterError(adapter, f"{CONFIG_NAME}: r must be at least 1 and lora_alpha finite")
    return LoraConfig(
        r=fields.r,
        lora_alpha=fields.lora_alpha,
        base_model=fields.base_model_name_or_path,
        use_rslora=bool(fields.use_rslora),
        use_dora=bool(fields.use_dora),
        rank_pattern=_compiled(adapter, ranks),
        alpha_pattern=_compiled(adapter, alphas),
        target_parameters=fields.target_parameters or (),
        raw=raw,
    )


def _conversion(peft_type: str) -> str | None:
    """What makes a LoRA of an adapter of another method, if anything does."""
    if peft_type == "ADALORA":
        return "convert it: lora_A with its rows times lora_E is the lora_A of a LoRA"
    if peft_type in _CONVERTIBLE:
        return "convert it: load it with PEFT, then peft.save_as_lora(PATH, model, rank=R)"
    return None


def _compiled(adapter: str, patterns: dict[str, Any]) -> dict[str, Any]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise AdapterError(adapter, f"{CONFIG_NAME}: pattern {pattern!r}: {error}") from None
    return patterns


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
    if one_rank and config.has_patterns:
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

"""``adapter_config.json``: what of it decides the update, and which variants of LoRA are refused."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import msgspec

from ..base.errors import AdapterError
from .foreign import MLX

CONFIG_NAME = "adapter_config.json"
LFS_MAGIC = b"version https://git-lfs"

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
_MLX_FIELDS = {"fine_tune_type", "lora_parameters", "lora_layers"}
# These initialisations subtract the initial B A from the base weights, so the saved factors are no update of the base.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class NotLora(AdapterError):
    """A PEFT configuration of another method, or none of PEFT at all."""


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


def parse_config(adapter: str, data: bytes) -> LoraConfig:
    """Read ``adapter_config.json``. Raises AdapterError, naming the method, for anything but plain LoRA."""
    if data.startswith(LFS_MAGIC):
        raise AdapterError(adapter, f"{CONFIG_NAME} is a Git LFS pointer, not the file", "run 'git lfs pull'")
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterError(adapter, f"{CONFIG_NAME} is not JSON: {error}") from None
    if not isinstance(raw, dict) or "peft_type" not in raw:
        if isinstance(raw, dict) and _MLX_FIELDS & raw.keys():
            raise NotLora(adapter, f"{CONFIG_NAME} is of {MLX.owner}, not of PEFT", MLX.hint)
        raise NotLora(adapter, f"{CONFIG_NAME} has no peft_type: not a PEFT adapter")
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
    init = str(fields.init_lora_weights).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        raise AdapterError(
            adapter,
            f"init_lora_weights={fields.init_lora_weights!r} changed the base weights, so B A is not the update",
            "convert it: model.save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    ranks, alphas = fields.rank_pattern or {}, fields.alpha_pattern or {}
    numbers = [fields.lora_alpha, *alphas.values()]
    if fields.r < 1 or any(rank < 1 for rank in ranks.values()) or not all(map(math.isfinite, numbers)):
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


def _pattern_key(patterns: dict[str, Any], module: str) -> str:
    """PEFT's rule: the first pattern that matches the end of the name, at a dot or the whole of it."""
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", module):
            return pattern
    return module

"""The ``adapter_config.json`` of an exported adapter: the original one, made to fit the factors that are exported."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

# What these say of how the adapter was made (its initialisation, a backward pass) no longer holds for its factors.
_CLEARED = ("eva_config", "corda_config", "lora_ga_config", "velora_config")


def peft_config(
    original: dict[str, Any], ranks: dict[str, int], embeddings: bool, parameters: Collection[str] = ()
) -> dict[str, Any]:
    """The configuration under which PEFT scales every module by 1 and targets exactly the modules of ``ranks``.

    Those that are ``parameters`` are selected by the ``target_parameters`` of ``original``, which has no others.

    The largest rank is r and lora_alpha; modules of another rank are in rank_pattern and alpha_pattern. All fields
    that have no part in this keep the values of ``original``. ``embeddings`` tells whether a target is an embedding.
    """
    r = max(ranks.values())
    modules = sorted(ranks.keys() - set(parameters))
    pattern = {f"^{re.escape(module)}": rank for module, rank in sorted(ranks.items()) if rank != r}
    config = original | {
        "r": r,
        "lora_alpha": r,
        "use_rslora": False,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": modules,
        "exclude_modules": _others(modules),
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    config |= {field: None for field in _CLEARED if field in original}
    if "loftq_config" in original:
        config["loftq_config"] = {}
    if embeddings and original.get("ensure_weight_tying"):
        # PEFT would make the factors of a tied output layer views of the embedding's, which compression does not keep.
        config["ensure_weight_tying"] = False
    return config


def _others(modules: Iterable[str]) -> str | None:
    """A pattern of modules that ``target_modules`` would match though it must not, or None if that is unlikely.

    PEFT matches a target at the end of a name, at a dot. That is unambiguous for a path like
    ``model.layers.0.self_attn.q_proj``, but a module at the top, like ``proj``, shares its name with others.
    """
    top = [re.escape(module) for module in sorted(modules) if "." not in module]
    if not top:
        return None
    own = "|".join(re.escape(module) for module in sorted(modules))
    return rf"(?!(?:{own})$).*\.(?:{'|'.join(top)})"

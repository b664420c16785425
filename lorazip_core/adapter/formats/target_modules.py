"""Which modules of a model a LoRA configuration selects, by PEFT's own rule.

A configuration that selects all modules of an adapter is exported as it was: PEFT with Transformers 4.52 or later
renames the keys of weights when it loads them, and patterns like ``q_proj`` still hold then, full paths do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..module import Module

_DECIDE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def selection(original: dict[str, Any], modules: Iterable[Module]) -> dict[str, Any]:
    """The fields of ``original`` that have to change for PEFT to put a LoRA on each of ``modules``: often none.

    What else ``original`` selects stays selected: PEFT gives it factors of zero, as it does with the original. Where
    one of the modules would be left out, targets become the full paths of all of them.
    """
    modules = list(modules)
    if all(selects(original, module) for module in modules):
        return {}
    names = sorted(module.name for module in modules)
    targets: str | list[str] = names
    if any("." not in name for name in names):
        # PEFT matches a listed name at the end of a path, where the name of a module at the top says too little.
        targets = "|".join(map(re.escape, names))
    return {field: None for field in _DECIDE if original.get(field) is not None} | {"target_modules": targets}


def selects(config: dict[str, Any], module: Module) -> bool:
    """Whether PEFT puts a LoRA on ``module`` under ``config``; False where that depends on the model."""
    try:
        return _targeted(config, module) and not _excluded(config, module.name)
    except (re.error, TypeError):  # no pattern, or no list of names
        return False


def _targeted(config: dict[str, Any], module: Module) -> bool:
    targets, name = config.get("target_modules"), module.name
    if not targets:
        return False
    if isinstance(targets, str):
        if targets.lower() == "all-linear":  # all but the output layer, which is at the top
            return module.kind == "linear" and "." in name
        return matches(targets, name)
    return name in targets or (matches(targets, name) and _in_layers(config, name))


def _in_layers(config: dict[str, Any], name: str) -> bool:
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return True
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    else:
        each = [patterns] if isinstance(patterns, str) else patterns
        found = next(filter(None, (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in each)), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def _excluded(config: dict[str, Any], name: str) -> bool:
    excluded, saved = config.get("exclude_modules"), config.get("modules_to_save")
    if saved and any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in saved):
        return True
    return matches(excluded or (), name)


def matches(targets: str | Iterable[str], name: str) -> bool:
    """Whether ``name`` is among ``targets``: a pattern for all of it, or names of which one is its end, at a dot."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)

"""The names that PEFT gives to tensors, out of those in a file: without training wrappers and the adapter's own name.

A model is wrapped to be compiled or trained on several devices, and saved from within the wrapper its tensors carry the
wrapper's name, or, from a PEFT model within another, PEFT's own prefix again. PEFT finds no layer of such a name and
applies nothing, without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ...base.errors import AdapterError
from ..layout import Names
from .names import PREFIX

# No layer of a model has one of these names, so that they can be left out wherever they are.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_fpw_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
}
# DistributedDataParallel and DeepSpeed wrap a whole model in ``module``. Further down it may be a layer's name.
PARALLEL = "module"
_BEFORE_PREFIX = re.compile(rf"^(?:{PARALLEL}\.)+(?={re.escape(PREFIX)})")
_WITHIN_PREFIX = f"{PREFIX}{PARALLEL}."
_REPEATS = re.compile(rf"^(?:{re.escape(PREFIX)})+(?={re.escape(PREFIX)})")

# A tensor of one of several adapters in a model, as state_dict() names it: X.lora_A.default.weight, and so on.
_WITH_ADAPTER = re.compile(
    r"(?P<head>.*\.lora_[AB])\.(?P<layer>[^.]+)(?P<end>\.weight|\.bias)"
    r"|(?P<parameter>.*\.(?:lora_embedding_[AB]|lora_magnitude_vector))\.(?P<own>(?!weight$)[^.]+)(?:\.weight)?"
)
_WITHOUT_ADAPTER = re.compile(
    r".*\.(?:lora_[AB]\.(?:weight|bias)|lora_(?:embedding_[AB]|magnitude_vector)(?:\.weight)?)"
)
_MAGNITUDE = re.compile(r"(?<=\.lora_magnitude_vector)\.weight$")
_SAVED = re.compile(r"(?P<head>.*)\.modules_to_save\.(?P<own>[^.]+)(?P<end>\..+)")


def ordinary_names(adapter: str, stored: Sequence[str]) -> Names:
    """The names that PEFT gives to the tensors of one adapter, which are named ``stored`` in its files.

    Raises AdapterError where that cannot be told: two tensors would get one name, or several adapters are in one file.
    """
    ordinary = {key: _BEFORE_PREFIX.sub("", _unwrapped(key)) for key in stored}
    removed = {
        f"{part} ({_WRAPPERS[part]})"
        for key in stored
        if "._" in f".{key}"
        for part in key.split(".")
        if part in _WRAPPERS
    }
    parallel = any(_BEFORE_PREFIX.match(_unwrapped(key)) for key in stored)
    repeated = False
    while True:  # each may be within the other
        if _all_parallel(ordinary.values()):
            parallel = True
            ordinary = {key: name.replace(_WITHIN_PREFIX, PREFIX, 1) for key, name in ordinary.items()}
        elif any(name.startswith(PREFIX * 2) for name in ordinary.values()):
            repeated = True
            ordinary = {key: _REPEATS.sub("", name) for key, name in ordinary.items()}
        else:
            break
    if repeated:
        removed.add(f"the repeated {PREFIX.rstrip('.')} (PEFT around PEFT)")
    if parallel:
        removed.add(f"{PARALLEL} (DistributedDataParallel or DeepSpeed)")
    if own := _adapter_name(adapter, ordinary.values()):
        removed.add(f"{own} (the name of the adapter)")
        ordinary = {key: _without_adapter(name, own) for key, name in ordinary.items()}
    ordinary = {key: _MAGNITUDE.sub("", name) for key, name in ordinary.items()}
    _refuse_equal(adapter, ordinary)
    return Names({key: name for key, name in ordinary.items() if name != key}, tuple(sorted(removed)))


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _all_parallel(keys: Iterable[str]) -> bool:
    """Whether all of the model is within ``module``; where only a part is, it may be a layer of that name."""
    inner = [key for key in keys if key.startswith(PREFIX)]
    return bool(inner) and all(key.startswith(_WITHIN_PREFIX) for key in inner)


def _adapter_name(adapter: str, keys: Iterable[str]) -> str | None:
    """The adapter's name that all LoRA tensors carry, or None when none of them carries one."""
    named: dict[str, str] = {}
    nameless = None
    for key in keys:
        if _WITHOUT_ADAPTER.fullmatch(key):
            nameless = key
        elif match := _WITH_ADAPTER.fullmatch(key):
            named.setdefault(match["layer"] or match["own"], key)
    if not named:
        return None
    (name, key), *others = named.items()
    if others:
        raise AdapterError(
            adapter,
            f"its file holds several adapters, {' and '.join(map(repr, named))} (tensors {key} and {others[0][1]})",
            "save each on its own: model.save_pretrained(..., selected_adapters=[...])",
        )
    if nameless:
        reason = f"tensor {key} carries the name of an adapter, {name!r}, but {nameless} carries none"
        raise AdapterError(adapter, reason, "is something of another adapter among them?")
    return name


def _without_adapter(key: str, name: str) -> str:
    if match := _WITH_ADAPTER.fullmatch(key):
        return match["parameter"] or match["head"] + match["end"]
    saved = _SAVED.fullmatch(key)
    return saved["head"] + saved["end"] if saved and saved["own"] == name else key


def _refuse_equal(adapter: str, ordinary: dict[str, str]) -> None:
    seen: dict[str, str] = {}
    for key, name in ordinary.items():
        if name in seen:
            reason = f"tensors {seen[name]} and {key} are both {name} without the names of wrappers"
            raise AdapterError(adapter, reason, "which of them is right? save the adapter again from the model itself")
        seen[name] = key

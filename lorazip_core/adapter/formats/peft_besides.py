"""What a PEFT adapter does besides adding ΔW x to the outputs of its modules, and which tensors it has for that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .dora import is_magnitude
from .lora_bias import biased_module
from .names import PREFIX

_OTHERWISE = {
    "alora_invocation_tokens": "it is an activated LoRA, which acts from certain tokens on (alora_invocation_tokens)",
    "layer_replication": "it is for a model whose layers are replicated (layer_replication)",
}
_BASE_WEIGHT = ".base_layer.weight"
_TRAINED_TOKENS = ".trainable_tokens_"


def besides(config: Mapping[str, Any], extras: Iterable[str]) -> str | None:
    """Why more than its updates makes this adapter, as a clause about "it"; None if they are all of it.

    ``extras`` are the names of its tensors that are no factors. Copies of weights of the base model (`base_weights`)
    are no reason, if the model has the same.
    """
    for field, reason in _OTHERWISE.items():
        if config.get(field):
            return reason
    copies = base_weights(extras)
    return next((_reason(key) for key in extras if key not in copies.values()), None)


def base_weights(extras: Iterable[str]) -> dict[str, str]:
    """The tensors that PEFT copies from the base model beside a LoRA on an embedding, by the module they are of."""
    return {
        key.removeprefix(PREFIX).removesuffix(_BASE_WEIGHT): key
        for key in extras
        if key.startswith(PREFIX) and key.endswith(_BASE_WEIGHT)
    }


def _reason(key: str) -> str:
    if is_magnitude(key):
        return "it is DoRA, which scales whole rows of weights by magnitudes"
    if module := biased_module(key):
        return f"it has biases beside its factors (lora_bias), one of {module}"
    if _TRAINED_TOKENS in key:
        return f"it has tokens of its own: {key}"
    if key.endswith(".bias"):
        return f"it has trained biases: {key}"
    return f"it has weights besides its factors: {key}"

"""What vLLM 0.24 to 0.33 loads as a LoRA adapter, as far as a bundle tells.

Whether the model's class has LoRA for its embedding and its head (Llama and its relatives do), and whether the
vocabulary is the base model's, only the server knows.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from ..adapter.formats.names import CONFIG_NAME
from ..base.errors import Unsupported
from ..bundle.manifest import AdapterEntry, ModuleEntry
from ..bundle.reader import Bundle

# The values that vLLM accepts for --max-lora-rank.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_REFUSED_FIELDS = (
    "modules_to_save",
    "lora_bias",
    "use_dora",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "layer_replication",
    "arrow_config",
)
# Weights of the base model that PEFT saves beside a LoRA on them; vLLM passes over these and takes its own.
_BASE_WEIGHTS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_EMBEDDING = "embed_tokens"  # the one name under which its models have an embedding with LoRA
_HEAD = "lm_head"
_LARGEST_HEAD = 258_048  # rows of a head with LoRA


def check_adapters(bundle: Bundle, adapters: Sequence[AdapterEntry]) -> None:
    """Raise Unsupported, naming each adapter and the reason, if vLLM would refuse it or ignore a part of it."""
    reasons = [(adapter.name, why_refused(bundle, adapter)) for adapter in adapters]
    refused = [f"{name!r}: {reason}" for name, reason in reasons if reason]
    if refused:
        count = f"{len(refused)} of {len(reasons)} adapters"
        raise Unsupported(
            f"vLLM does not take {count} ({'; '.join(refused)})",
            "export them without «target» vllm, or name the others with «adapters»",
        )


def max_lora_rank(ranks: Sequence[int]) -> int:
    """The smallest --max-lora-rank that covers all ``ranks``. Raises Unsupported when there is none."""
    largest = max(ranks)
    for allowed in RANKS:
        if largest <= allowed:
            return allowed
    raise Unsupported(f"vLLM takes ranks up to {RANKS[-1]}, and one adapter here has {largest}", "use «rank»")


def why_refused(bundle: Bundle, adapter: AdapterEntry) -> str | None:
    """Why vLLM would refuse an adapter or ignore a part of it; None if it would do neither."""
    config = bundle.config(adapter)
    if config.get("use_dora"):
        return "it is DoRA, which needs its magnitudes"
    names = [] if adapter.extras is None else bundle.names(adapter.extras)
    carried = [name for name in names if not name.endswith(_BASE_WEIGHTS)]
    if carried:
        more = f" and {len(carried) - 1} more" if len(carried) > 1 else ""
        return f"it has tensors besides its LoRA factors: {carried[0]}{more}"
    for field in _REFUSED_FIELDS:
        if config.get(field):
            return f"{field} is set in its {CONFIG_NAME}"
    if config.get("bias", "none") != "none":
        return f"bias is {config['bias']!r} in its {CONFIG_NAME}"
    return next(filter(None, map(_module_reason, bundle.modules(adapter))), None)


def _module_reason(module: ModuleEntry) -> str | None:
    if module.parameter is not UNSET:
        return f"{module.name} is of a parameter (target_parameters), a form that vLLM reads for few models only"
    above, _, last = module.name.rpartition(".")
    if module.kind == "conv":
        return f"module {module.name} is a convolution"
    if module.kind == "embedding" and last != _EMBEDDING:
        return f"module {module.name} is an embedding of another name than {_EMBEDDING}"
    if last == _HEAD and module.d_out > _LARGEST_HEAD:
        return f"module {module.name} has {module.d_out} rows, more than {_LARGEST_HEAD}"
    if module.name.partition(".")[2][:1].isdigit() or (module.kind == "embedding" and not above):
        # An adapter of the bare backbone: vLLM loads it, finds no layer of that path, and serves the base model.
        return f"module {module.name} is no full path from the top of a causal language model"
    return None

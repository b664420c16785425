"""What vLLM loads as a LoRA adapter, as far as a bundle tells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from msgspec import UNSET

from ..bundle import AdapterEntry, Bundle, ModuleEntry
from ..errors import Unsupported
from ..linalg import Factors

# The values that vLLM accepts for --max-lora-rank.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_REFUSED_FIELDS = ("modules_to_save", "lora_bias", "alora_invocation_tokens", "layer_replication", "arrow_config")


def check_adapters(bundle: Bundle, adapters: Sequence[AdapterEntry]) -> None:
    """Raise Unsupported, naming each adapter and the reason, if vLLM would refuse it or ignore a part of it."""
    reasons = [(adapter.name, _reason(bundle, adapter)) for adapter in adapters]
    refused = [f"{name!r}: {reason}" for name, reason in reasons if reason]
    if refused:
        count = f"{len(refused)} of {len(reasons)} adapters"
        raise Unsupported(
            f"vLLM does not take {count} ({'; '.join(refused)})",
            "export them without --target vllm, or name the others with --adapter",
        )


def max_lora_rank(ranks: Sequence[int]) -> int:
    """The smallest --max-lora-rank that covers all ``ranks``. Raises Unsupported when there is none."""
    largest = max(ranks)
    for allowed in RANKS:
        if largest <= allowed:
            return allowed
    raise Unsupported(f"vLLM takes ranks up to {RANKS[-1]}, and one adapter here has {largest}", "use --rank")


def padded(factors: Factors, rank: int) -> Factors:
    """B [d_out, k] and A [k, d_in] with zeros added up to ``rank``: vLLM knows one rank for all modules."""
    b, a = factors
    missing = rank - a.shape[0]
    return torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing))


def _reason(bundle: Bundle, adapter: AdapterEntry) -> str | None:
    config = bundle.config(adapter)
    if config.get("use_dora"):
        return "it is DoRA, which needs its magnitudes"
    if adapter.extras is not None:
        names = bundle.names(adapter.extras)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"it has tensors besides its LoRA factors: {names[0]}{more}"
    for field in _REFUSED_FIELDS:
        if config.get(field):
            return f"{field} is set in its adapter_config.json"
    if config.get("bias", "none") != "none":
        return f"bias is {config['bias']!r} in its adapter_config.json"
    return _module_reason(bundle.modules(adapter))


def _module_reason(modules: Sequence[ModuleEntry]) -> str | None:
    for module in modules:
        if module.parameter is not UNSET:
            return f"{module.name} is of a parameter (target_parameters), a form that vLLM reads for few models only"
        if module.kind != "linear":
            return f"module {module.name} is {'an embedding' if module.kind == 'embedding' else 'a convolution'}"
        if module.name.partition(".")[2][:1].isdigit():
            # An adapter of the bare backbone: vLLM loads it, finds no layer of that path, and serves the base model.
            return f"module {module.name} is no full path from the top of a causal language model"
    return None

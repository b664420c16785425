"""Before vLLM 0.31 the prefix cache knows an adapter by its name alone, and takes one for another that had its name."""

from __future__ import annotations

from typing import Any

from vllm.v1.core import kv_cache_utils

from .source import KEY


def install() -> None:
    """Let paths of bundles be part of what cached blocks are known by."""
    stock = kv_cache_utils._gen_lora_extra_hash_keys

    def with_path(request: Any) -> list[Any]:
        keys: list[Any] = stock(request)
        lora = request.lora_request
        if lora is not None and lora.lora_path.startswith(f"{KEY}:"):
            keys = [*keys, lora.lora_path] if isinstance(keys[0], str) else keys
        return keys

    kv_cache_utils._gen_lora_extra_hash_keys = with_path

"""What of vLLM's insides the plugin uses, so that what a release lacks is told at once and by name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

REBOUND = (
    "vllm.config:VllmConfig.__post_init__",
    "vllm.v1.core.kv_cache_utils:_gen_lora_extra_hash_keys",
    "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager",
)
"""Rebound in every process, whether or not a bundle is served."""
WITH_A_BUNDLE = (
    *(
        f"vllm.entrypoints.openai.models.serving:OpenAIServingModels.{name}"
        for name in ("load_lora_adapter", "resolve_lora", "show_available_models", "unload_lora_adapter")
    ),
    "vllm.entrypoints.openai.models.serving:create_error_response",
    "vllm.exceptions:VLLMNotFoundError",
    "vllm.lora.request:LoRARequest",
    "vllm.lora.resolver:LoRAResolver",
    "vllm.model_executor.layers.attention.mla_attention:MLAAttention",
    *(
        f"vllm.model_executor.layers.linear:{name}"
        for name in ("ColumnParallelLinear", "LinearBase", "QKVParallelLinear", "ReplicatedLinear", "RowParallelLinear")
    ),
    "vllm.model_executor.layers.quantization.base_config:QuantizeMethodBase",
    *(
        f"vllm.v1.engine.{engine}.{method}"
        for engine in ("async_llm:AsyncLLM", "llm_engine:LLMEngine")
        for method in ("add_lora", "remove_lora")
    ),
    "vllm.v1.engine.input_processor:InputProcessor._validate_lora",
)
"""Used or rebound where one is."""


def missing(names: Sequence[str]) -> list[str]:
    """Those of ``names``, each MODULE:NAME, that are not there."""
    return [name for name in names if not _is_there(name)]


def _is_there(name: str) -> bool:
    module, _, path = name.partition(":")
    try:
        found: object = import_module(module)
        for each in path.split("."):
            found = getattr(found, each)
    except (ImportError, AttributeError):
        return False
    return True

"""vLLM's entry point ``vllm.general_plugins``: `register`, called in every process of an engine.

An engine whose ``additional_config`` has ``{"lorazip": {"bundle": DIR}}`` serves the adapters of a bundle; any other
one works as if this were not installed. These names of vLLM are given another value here, and nothing else is:

- ``LRUCacheWorkerLoRAManager`` in ``v1.worker.lora_model_runner_mixin``: what holds adapters in a worker, `manager`;
- ``InputProcessor._validate_lora``: a request for an adapter that is not there is refused before it gets to the engine;
- of ``OpenAIServingModels``, the list of models, loading and unloading, see `frontend`;
- before vLLM 0.31, ``kv_cache_utils._gen_lora_extra_hash_keys``: the prefix cache knows an adapter by its path, too.
"""

from __future__ import annotations

from typing import Any

from .source import settings
from .versions import check


def register() -> None:
    """Make vLLM know bundles. May be called more than once. Raises LocalError for a version that is not supported."""
    import vllm
    from vllm.v1.worker import lora_model_runner_mixin as mixin

    if isinstance(mixin.LRUCacheWorkerLoRAManager, _Chosen):
        return
    check(vllm.__version__)
    mixin.LRUCacheWorkerLoRAManager = _Chosen(mixin.LRUCacheWorkerLoRAManager)
    from . import frontend, prefix_cache

    frontend.install()
    prefix_cache.install()


class _Chosen:
    """In place of a class: its instances, or a `BundleManager` for an engine that serves a bundle."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __call__(self, vllm_config: Any, device: Any, *arguments: Any, **options: Any) -> Any:
        found = settings(vllm_config)
        if found is None:
            return self.stock(vllm_config, device, *arguments, **options)
        from .manager import BundleManager

        return BundleManager(found, vllm_config, device)

"""vLLM's entry point ``vllm.general_plugins``: `register`, called in every process of an engine.

An engine whose ``additional_config`` has ``{"lorazip": {"bundle": DIR}}`` serves the adapters of a bundle; any other
one works as if this were not installed, whatever its release. These names of vLLM are given another value here:

- ``VllmConfig.__post_init__``: settings are checked as soon as an engine is asked for, see `configuration`;
- ``LRUCacheWorkerLoRAManager`` in ``v1.worker.lora_model_runner_mixin``: what holds adapters in a worker, `manager`;
- before vLLM 0.31, ``kv_cache_utils._gen_lora_extra_hash_keys``: the prefix cache knows an adapter by its path, too.

Where a bundle is served, those of the front end are, too, see `frontend`.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from ..base.errors import LocalError
from .needs import REBOUND, missing
from .source import settings
from .versions import check

logger = logging.getLogger("vllm.lorazip")


@cache
def register() -> None:
    """Make vLLM know bundles. It never raises: an exception would stop engines that have nothing to do with them.

    Where this vLLM cannot serve bundles, a line in the log says why, and an engine that is asked to raises LocalError.
    """
    try:
        import vllm

        reason = _unsupported(vllm.__version__)
        if reason is None:
            _rebind()
        else:
            logger.warning("lorazip cannot serve bundles here, other engines are not affected: %s", reason)
        from .configuration import install

        install(reason)
    except Exception:
        logger.exception("lorazip cannot serve bundles here, other engines are not affected")


def _unsupported(version: str) -> str | None:
    """Why vLLM ``version``, which is installed, cannot serve bundles."""
    try:
        check(version)
    except LocalError as error:
        return str(error)
    lacking = missing(REBOUND)
    return f"vLLM {version} has no {', '.join(lacking)}" if lacking else None


def _rebind() -> None:
    from vllm.v1.worker import lora_model_runner_mixin as mixin

    from . import prefix_cache

    mixin.LRUCacheWorkerLoRAManager = _Chosen(mixin.LRUCacheWorkerLoRAManager)
    prefix_cache.install()


class _Chosen:
    """In place of a class: its instances, or a `BundleManager` for an engine that serves a bundle."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __call__(self, vllm_config: Any, device: Any, *arguments: Any, **options: Any) -> Any:
        found = settings(vllm_config.additional_config)
        if found is None:
            return self.stock(vllm_config, device, *arguments, **options)
        from .manager import BundleManager

        return BundleManager(found, vllm_config, device)

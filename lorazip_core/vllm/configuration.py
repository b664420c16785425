"""What is checked and completed as soon as an engine is configured, in the process that asks for it.

The digest of the bundle's manifest becomes part of ``additional_config``, which is in the key of vLLM's cache of
compiled code: code that was compiled for one bundle has the sizes of its tables in it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

from ..base.errors import LocalError
from .forbidden import forbidden_in
from .needs import WITH_A_BUNDLE, missing
from .servable import check_adapters
from .source import KEY, opened, settings


def install(reason: str | None) -> None:
    """Have every ``VllmConfig`` that names a bundle prepared; with a ``reason``, it is refused with that."""
    from vllm.config import VllmConfig

    VllmConfig.__post_init__ = _preparing(VllmConfig.__post_init__, reason)


def _preparing(stock: Callable[[Any], None], reason: str | None) -> Callable[[Any], None]:
    @wraps(stock)
    def prepare(self: Any) -> None:
        if isinstance(self.additional_config, dict) and self.additional_config.get(KEY) is not None:
            if reason is not None:
                raise LocalError(reason)
            self.additional_config = self.additional_config | {KEY: _prepared(self)}
        stock(self)

    return prepare


def _prepared(vllm_config: Any) -> dict[str, Any]:
    """The settings of an engine, completed. Raises LocalError, Unsupported, and as `Bundle`."""
    found = settings(vllm_config.additional_config)
    assert found is not None
    if vllm_config.lora_config is None:
        raise LocalError(f"{found.source.bundle} cannot be served without LoRA", "start the engine with enable_lora")
    if (forbidden := forbidden_in(vllm_config)) is not None:
        raise LocalError(f"{found.source.bundle} cannot be served with {forbidden.field}: {forbidden.why}")
    if lacking := missing(WITH_A_BUNDLE):
        raise LocalError(f"this vLLM has no {', '.join(lacking)}", "install another release of it")
    bundle = found.source.open()
    _check(found.source.bundle, bundle.digest)
    from . import frontend

    frontend.install()
    given: dict[str, Any] = vllm_config.additional_config[KEY]
    return given | {"bundle": str(found.source.bundle), "manifest_sha256": bundle.digest}


@lru_cache(maxsize=4)
def _check(path: Path, _: str) -> None:
    """Once for each bundle: vLLM makes several configurations of an engine."""
    check_adapters(opened(path))

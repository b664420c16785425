"""What cached blocks are known by, in releases of vLLM that know an adapter by its name alone, and in later ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm.version", reason="needs vLLM (make test-vllm)")

from vllm.lora.request import LoRARequest
from vllm.v1.core import kv_cache_utils

from lorazip_core.vllm import prefix_cache

NAME = "_gen_lora_extra_hash_keys"


def keys(path: str | None) -> list[Any]:
    adapter = LoRARequest("a", 1, path) if path else None
    found: list[Any] = getattr(kv_cache_utils, NAME)(SimpleNamespace(lora_request=adapter))
    return found


def before_0_31(request: Any) -> list[str]:
    return [request.lora_request.lora_name] if request.lora_request else []


def test_two_of_one_name_in_an_old_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache_utils, NAME, before_0_31)
    prefix_cache.install()
    assert keys("lorazip:1:/x") != keys("lorazip:2:/x")
    assert keys("lorazip:1:/x") == ["a", "lorazip:1:/x"]
    assert keys("/an/ordinary/adapter") == ["a"]
    assert keys(None) == []


def test_two_of_one_name_in_this_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache_utils, NAME, getattr(kv_cache_utils, NAME))
    prefix_cache.install()
    assert keys("lorazip:1:/x") != keys("lorazip:2:/x")
    assert keys(None) == []

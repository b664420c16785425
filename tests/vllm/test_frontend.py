"""What vLLM's list of models does when it is asked for names. No engine runs."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm.version", reason="needs vLLM (make test-vllm)")

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.exceptions import VLLMNotFoundError

from lorazip_core.vllm import frontend
from lorazip_core.vllm.admission import Admission
from lorazip_core.vllm.source import settings


@pytest.fixture
def models(bundle: Path) -> Any:
    """As much of them as looking for names takes."""
    frontend.install()
    found = settings({"lorazip": {"bundle": str(bundle)}})
    assert found is not None
    made: Any = object.__new__(OpenAIServingModels)
    made.lora_requests, made.lora_resolvers, made.lora_resolver_lock = {}, [], defaultdict(asyncio.Lock)
    made.engine_client = SimpleNamespace(input_processor=SimpleNamespace(_lorazip=Admission(found.source)))
    return made


def test_names_that_are_nowhere_take_no_memory(models: Any) -> None:
    async def ask() -> None:
        for number in range(9):
            answer = await models.resolve_lora(f"nowhere-{number}" * 100)
            assert answer.error.code == 404
        with pytest.raises(VLLMNotFoundError, match="did you mean 'fv_capitalize'"):
            await models.resolve_lora("fv_capitalise")

    asyncio.run(ask())
    assert not models.lora_resolver_lock
    assert not vars(models).get("_lorazip")


def test_a_lock_of_a_name_is_one_as_long_as_it_is_used(models: Any) -> None:
    async def ask() -> None:
        first = frontend._lock(models, "a")
        async with first:
            assert frontend._lock(models, "a") is first
            assert frontend._lock(models, "b") is not first
            assert not frontend._is_unknown(models, models.engine_client.input_processor._lorazip, "a")
        del first
        assert frontend._is_unknown(models, models.engine_client.input_processor._lorazip, "a")

    asyncio.run(ask())

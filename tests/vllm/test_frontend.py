"""What vLLM's list of models does when it is asked for names. No engine runs."""

from __future__ import annotations

import asyncio
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm.version", reason="needs vLLM (make test-vllm)")

from vllm.entrypoints.openai.models.serving import BaseModelPath, OpenAIServingModels
from vllm.exceptions import VLLMNotFoundError
from vllm.v1.engine.input_processor import InputProcessor

from lorazip_core.base.errors import LocalError
from lorazip_core.vllm import frontend
from lorazip_core.vllm.admission import Admission, admission
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


def test_the_bundle_is_opened_at_the_start(bundle: Path, tmp_path: Path) -> None:
    """And may be anywhere else when the first request comes."""
    frontend.install()
    place = shutil.copytree(bundle, tmp_path / "bundle")
    processor: Any = object.__new__(InputProcessor)
    processor.vllm_config = SimpleNamespace(additional_config={"lorazip": {"bundle": str(place)}})
    frontend._beginning(lambda self: None)(processor)
    assert hasattr(InputProcessor.__init__, "__wrapped__")
    place.rename(tmp_path / "elsewhere")
    known = admission(processor)
    assert known is not None
    assert known.serves("fv_capitalize")


def test_the_base_model_has_no_name_of_an_adapter(models: Any) -> None:
    begin = frontend._naming(lambda self: None)
    models.base_model_paths = [BaseModelPath("a", "path"), BaseModelPath("b", "path")]
    begin(models)
    models.base_model_paths[1].name = "fv_capitalize"
    with pytest.raises(LocalError, match="fv_capitalize is the name of an adapter and of the base model"):
        begin(models)
    assert hasattr(OpenAIServingModels.__init__, "__wrapped__")


@pytest.mark.parametrize(
    "message",
    [
        "no room",
        "Call to add_lora method failed: no room",
        "Call to add_lora method failed: Worker failed with error 'no room', please check the stack trace above "
        "for the root cause",
    ],
)
def test_of_a_refusal_the_cause_is_told(message: str) -> None:
    assert frontend._cause(message) == "no room"


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

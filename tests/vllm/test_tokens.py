"""A mixed batch has, token by token, the answers that each of its adapters gives alone, wherever else it is served.

All is in float32, as in less precision routes that are equally right differ where two tokens are nearly as likely.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm.version", reason="needs vLLM (make test-vllm)")

from testing.engine import MUTANTS, NEW, Request, answers
from testing.peft_fixtures import load_adapter
from testing.served_llama import NAMES, SKETCHES, ServedLlama, make, model

from lorazip_core.bundle.reader import Bundle
from lorazip_core.schemes.registry import SCHEMES
from lorazip_core.serving.attach import attach

pytestmark = pytest.mark.slow

GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
OF_BUNDLE = "lorazip:"
SCHEME = {sketch.name: sketch.scheme for sketch in SKETCHES}
ALONE = {name for name, scheme in SCHEME.items() if scheme in ("coded", "original", "svd")}


def _rows() -> list[tuple[list[int], str | None]]:
    """Two prompts for every adapter and for none, of uneven lengths, neighbours never of one adapter."""
    generator = torch.Generator().manual_seed(3)
    names = [*NAMES, None, *NAMES[::-1], None]
    return [
        (torch.randint(7, 33, (4 + number % 7,), generator=generator).tolist(), name)
        for number, name in enumerate(names)
    ]


ROWS = _rows()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> ServedLlama:
    made = make(tmp_path_factory.mktemp("tokens"))
    manifest = Bundle(made.bundle).manifest
    assert {adapter.scheme for adapter in manifest.adapters} == SCHEMES.keys()
    assert len(manifest.clusters) == 4
    return made


@pytest.fixture(scope="module")
def expected(case: ServedLlama) -> list[list[int]]:
    """By PEFT, one after another."""
    found: dict[int, list[int]] = {}
    base = model()
    for name in dict.fromkeys(name for _, name in ROWS):
        alone: Any = base if name is None else load_adapter(case.exported / name, base)
        for number, (prompt, whose) in enumerate(ROWS):
            if whose == name:
                tokens = alone.generate(input_ids=torch.tensor([prompt]), **GREEDY)
                found[number] = tokens[0, len(prompt) :].tolist()
        base = base if name is None else alone.unload()
    return [found[number] for number in range(len(ROWS))]


@pytest.fixture(scope="module")
def engine(case: ServedLlama) -> dict[str, Any]:
    return {
        "model": str(case.model),
        "enable_lora": True,
        "max_loras": len(NAMES) + 1,  # before 0.33, on a CPU, rows without an adapter have that of the last slot
        "max_lora_rank": 16,
    }


def test_adapters_change_tokens(case: ServedLlama, expected: list[list[int]]) -> None:
    """Else nothing here would be a proof."""
    base = model()
    for (prompt, name), tokens in zip(ROWS, expected, strict=True):
        alone = base.generate(input_ids=torch.tensor([prompt]), **GREEDY)[0, len(prompt) :].tolist()
        assert (alone == tokens) == (name is None), name


def test_attached_to_a_model_of_transformers(case: ServedLlama, expected: list[list[int]]) -> None:
    longest = max(len(prompt) for prompt, _ in ROWS)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in ROWS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in ROWS])
    with attach(model(), case.bundle) as served:
        found = served.generate(input_ids=ids, attention_mask=mask, adapter_names=[name for _, name in ROWS], **GREEDY)
    assert found[:, longest:].tolist() == expected


def test_exported_as_ordinary_loras(
    case: ServedLlama, engine: dict[str, Any], expected: list[list[int]], tmp_path: Path
) -> None:
    requests = [Request(prompt, name, str(case.exported / name) if name else None) for prompt, name in ROWS]
    assert answers(tmp_path, engine, requests)["as it is"] == expected


def _of_bundle(case: ServedLlama, engine: dict[str, Any]) -> tuple[dict[str, Any], list[Request]]:
    requests = [Request(prompt, name, OF_BUNDLE if name else None) for prompt, name in ROWS]
    return engine | {"additional_config": {"lorazip": {"bundle": str(case.bundle)}}, "max_lora_rank": 1}, requests


def test_from_a_bundle(case: ServedLlama, engine: dict[str, Any], expected: list[list[int]], tmp_path: Path) -> None:
    """And an engine that takes anything of another adapter gives other answers, to those that it concerns alone."""
    found = answers(tmp_path, *_of_bundle(case, engine), MUTANTS)
    assert found["as it is"] == expected
    shared = {name for name in NAMES if name not in ALONE}
    concerned = {"cluster": shared, "core": shared, "row": ALONE, "codes": ALONE, "none": {None}}
    for mutant in MUTANTS:
        other = [name for (_, name), a, b in zip(ROWS, found[mutant], expected, strict=False) if a != b]
        assert set(other) == concerned[mutant], mutant


def test_from_a_bundle_by_a_compiled_model(
    case: ServedLlama, engine: dict[str, Any], expected: list[list[int]], tmp_path: Path
) -> None:
    asked, requests = _of_bundle(case, engine)
    assert answers(tmp_path, asked | {"enforce_eager": False}, requests)["as it is"] == expected


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_from_a_bundle_by_two_gpus(
    case: ServedLlama, engine: dict[str, Any], expected: list[list[int]], tmp_path: Path
) -> None:
    asked, requests = _of_bundle(case, engine)
    two = asked | {"tensor_parallel_size": 2, "enforce_eager": False}
    assert answers(tmp_path, two, requests)["as it is"] == expected

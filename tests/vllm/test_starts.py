"""An engine that cannot serve what it is asked to does not start, and says why; any other one is not affected."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm.version", reason="needs vLLM (make test-vllm)")

import testing.engine_starts
from testing.engine import SMALL, run
from testing.living_llama import PROMPTS, LivingLlama
from testing.random_bundle import Sketch, make_bundle

from lorazip_core.adapter.module import Module
from lorazip_core.base.errors import LocalError
from lorazip_core.vllm.forbidden import FORBIDDEN, Forbidden
from lorazip_core.vllm.needs import REBOUND, WITH_A_BUNDLE, missing

SCRIPT = Path(testing.engine_starts.__file__)
Q = "model.layers.0.self_attn.q_proj"


def start(living: LivingLlama, place: Path, engines: list[dict[str, Any]], **others: str) -> list[Any]:
    plain = SMALL | {"model": str(living.model), "max_model_len": 128}
    spec = {"engines": [plain | each for each in engines], "prompt": PROMPTS[0], **others}
    found: list[Any] = run(place, SCRIPT, spec)
    return found


def of(bundle: Path, **others: Any) -> dict[str, Any]:
    lora = {"enable_lora": True, "max_loras": 4, "max_lora_rank": 1}
    return lora | {"additional_config": {"lorazip": {"bundle": str(bundle), **others}}}


@pytest.mark.slow
def test_what_makes_no_sense(living: LivingLlama, tmp_path: Path) -> None:
    kinds = make_bundle(tmp_path / "kinds")
    small = [Sketch("small", "svd", [0], 3)]
    elsewhere = make_bundle(tmp_path / "other", sketches=small, modules=[Module("model.layers.9.x", "linear", 8, 9)])
    smaller = make_bundle(tmp_path / "smaller", sketches=small, modules=[Module(Q, "linear", 128, 256)])
    cases = [
        (of(tmp_path / "none"), f"UsageError: {tmp_path}/none is not a directory"),
        (of(living.first, spar=3), 'LocalError: additional_config: "lorazip" knows no spar'),
        (of(living.first, manifest_sha256="0"), f"LocalError: {living.first} has the manifest "),
        (of(living.first) | {"enable_lora": False}, f"LocalError: {living.first} cannot be served without LoRA (start"),
        (of(living.first) | {"pipeline_parallel_size": 2}, "served with pipeline_parallel_size: each stage would have"),
        (of(living.others), "Unsupported: 1 of 2 adapters cannot be served exactly ('more': it has weights besides"),
        (of(kinds), "'e': embed is an embedding, which is not served; …) (make a bundle without them)"),
        (of(elsewhere), "1 of 1 modules of the bundle are no linear layers of the model: model.layers.9.x: is it its"),
        (of(smaller), f"module {Q} is [128, 256] in the bundle, but [256, 256] in the model: is it its base model?"),
    ]
    for (_, line), found in zip(cases, start(living, tmp_path, [engine for engine, _ in cases]), strict=True):
        assert line in str(found)


@pytest.mark.parametrize("forbidden", FORBIDDEN, ids=[each.field for each in FORBIDDEN])
def test_what_would_lose_adapters_is_refused(living: LivingLlama, forbidden: Forbidden) -> None:
    """Of any platform: on a CPU some cannot be had at all."""
    from vllm.engine.arg_utils import EngineArgs

    asked = of(living.first)
    plain = {name: value for name, value in asked.items() if name != "additional_config"}
    config = EngineArgs(model=str(living.model), max_model_len=128, **plain).create_engine_config()
    part = getattr(config, forbidden.part)
    assert getattr(part, forbidden.field) <= forbidden.most
    config.additional_config = asked["additional_config"]
    setattr(part, forbidden.field, forbidden.most + 1)
    with pytest.raises(LocalError) as raised:
        config.__post_init__()
    line = f"{living.first} cannot be served with {forbidden.field}: {forbidden.why}"
    assert str(raised.value) == line


@pytest.mark.parametrize("serving", [True, False])
def test_an_engine_that_may_sleep_serves_no_bundle(
    living: LivingLlama, monkeypatch: pytest.MonkeyPatch, serving: bool
) -> None:
    """As on a GPU, where it can be asked for. Other engines may sleep."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_sleep_mode_available", lambda self: True)
    asked = of(living.first) if serving else STOCK
    engine = EngineArgs(model=str(living.model), max_model_len=128, enable_sleep_mode=True, **asked)
    if serving:
        with pytest.raises(LocalError, match="cannot be served with enable_sleep_mode: vLLM may discard what is held"):
            engine.create_engine_config()
    else:
        assert engine.create_engine_config().model_config.enable_sleep_mode


STOCK = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}


@pytest.mark.slow
def test_engines_that_serve_no_bundle_have_what_vllm_has(living: LivingLlama, tmp_path: Path) -> None:
    base = living.tokens[living.first][None][0]
    assert start(living, tmp_path, [STOCK]) == [[base, "LRUCacheWorkerLoRAManager"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("others", "line"),
    [
        ({"version": "0.23.1"}, "LocalError: vLLM 0.23.1 is not supported (install a release from 0.24 to 0.33)"),
        (
            {"without": "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager"},
            "has no vllm.v1.worker.lora_",
        ),
    ],
)
def test_with_another_vllm_only_bundles_are_not_served(
    living: LivingLlama, tmp_path: Path, others: dict[str, str], line: str
) -> None:
    base = living.tokens[living.first][None][0]
    refused, served = start(living, tmp_path, [of(living.first), {}], **others)
    assert line in refused
    assert served == [base, "NoneType"]


def test_what_this_vllm_lacks_is_named() -> None:
    assert missing([*REBOUND, *WITH_A_BUNDLE]) == []
    lacking = ["vllm.config:Nothing", "vllm.config:VllmConfig.nothing", "vllm.nothing:Thing"]
    assert missing([lacking[0], *REBOUND, *lacking[1:]]) == lacking


def test_code_that_was_compiled_for_one_bundle_is_not_taken_for_another(living: LivingLlama, tmp_path: Path) -> None:
    """Not even for one at the same place. On a CPU vLLM keeps none, so its key is looked at."""
    from vllm.engine.arg_utils import EngineArgs

    place = tmp_path / "bundle"
    asked = of(place)
    given = deepcopy(asked["additional_config"])

    def key(bundle: Path) -> str:
        place.unlink(missing_ok=True)
        place.symlink_to(bundle)
        engine = EngineArgs(model=str(living.model), max_model_len=128, **asked)
        return str(engine.create_engine_config().compute_hash())

    first = key(living.first)
    assert key(living.second) != first
    assert key(living.first) == first
    assert asked["additional_config"] == given

"""Which adapters are more than updates, and which modules an engine does not take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from testing.peft_fixtures import edit_config, save_adapter
from testing.random_bundle import MODULES, SKETCHES, Sketch, make_bundle
from testing.tiny_models import llama

from lorazip_core.base.errors import Unsupported
from lorazip_core.bundle.manifest import ParameterEntry
from lorazip_core.bundle.reader import Bundle
from lorazip_core.compress.run import compress
from lorazip_core.planning.options import CompressOptions
from lorazip_core.serving import servable
from lorazip_core.serving.attach import attach
from lorazip_core.serving.servable import base_weights, unservable

LAYER = "model.layers.0.self_attn.q_proj"
MORE: dict[str, tuple[dict[str, Any], str]] = {
    "activated": ({"alora_invocation_tokens": [5, 6]}, r"activated LoRA.*alora_invocation_tokens"),
    "bias": ({"bias": "lora_only"}, rf"trained biases: base_model\.model\.{LAYER}.*\.bias"),
    "dora": ({"use_dora": True}, "it is DoRA"),
    "lora-bias": ({"lora_bias": True}, rf"lora_bias\), one of {LAYER}"),
    "saved": ({"modules_to_save": ["lm_head"]}, r"weights besides its factors: base_model\.model\.lm_head\.weight"),
    "tokens": ({"trainable_token_indices": [3, 4]}, "tokens of its own: .*trainable_tokens_delta"),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Adapters with each of `MORE`, and some without."""
    root = tmp_path_factory.mktemp("servable")
    for seed, (name, (fields, _)) in enumerate(MORE.items()):
        model: Any = llama(1)
        if name == "bias":
            model.config.attention_bias = True
            model = type(model)(model.config)
        save_adapter(root / "in" / name, model, seed, r=2, target_modules=["q_proj"], **fields)
    for name in ("plain", "plainer", "replicated"):
        save_adapter(root / "in" / name, llama(1), len(name), r=2, target_modules=["q_proj"])
    save_adapter(root / "in" / "embedding", llama(1), 8, r=2, target_modules=["q_proj", "embed_tokens"])
    edit_config(root / "in" / "replicated", layer_replication=[[0, 1], [0, 1]])
    compress(root / "in", root / "bundle", CompressOptions(method="svd", rank=2, dtype="f32"))
    return Bundle(root / "bundle")


def test_adapters_that_are_more_than_updates(bundle: Bundle) -> None:
    reasons = unservable(bundle, {"linear", "embedding"})
    assert reasons.keys() == {*MORE, "replicated"}
    for name, (_, reason) in MORE.items():
        assert re.search(reason, reasons[name]), reasons[name]
    assert "layer_replication" in reasons["replicated"]


def test_attach_names_them_and_serves_the_others(bundle: Bundle) -> None:
    with pytest.raises(Unsupported, match=r"^7 of 10 adapters .*'activated': it is .*; 'bias': .*; …\) \(leave"):
        attach(llama(1), bundle)
    with pytest.raises(Unsupported, match=r"^1 of 2 adapters cannot be served exactly \('dora': it is DoRA"):
        attach(llama(1), bundle, only=["dora", "plain"])
    others = {adapter.name for adapter in bundle.manifest.adapters} - unservable(bundle, {"linear", "embedding"}).keys()
    with attach(llama(1), bundle, only=others) as served:
        assert served.names == ["embedding", "plain", "plainer"]


def test_an_embedding_has_a_copy_of_the_models(bundle: Bundle) -> None:
    found = {adapter.name: base_weights(bundle, adapter) for adapter in bundle.manifest.adapters}
    assert {name for name, weights in found.items() if weights} == {"embedding"}
    [(module, weight)] = found["embedding"].items()
    assert module == "model.embed_tokens"
    assert weight.equal(llama(1).state_dict()["model.embed_tokens.weight"])


def test_what_an_engine_takes(tmp_path: Path) -> None:
    plain = [Sketch(each.name, each.scheme, each.modules, each.rank) for each in SKETCHES]
    bundle = Bundle(make_bundle(tmp_path, sketches=plain))
    assert unservable(bundle, {"linear", "conv", "embedding"}) == {}
    kinds = {
        sketch.name: [MODULES[index].kind for index in sketch.modules if MODULES[index].kind != "linear"]
        for sketch in plain
    }
    words = {"embedding": "embed is an embedding", "conv": "layers.0.conv is a convolution"}
    expected = {name: f"{words[kind[0]]}, which is not served" for name, kind in kinds.items() if kind}
    assert unservable(bundle, {"linear"}) == expected
    assert unservable(bundle, {"linear", "embedding"}).keys() == {
        name for name, kind in kinds.items() if "conv" in kind
    }


def test_what_is_of_a_parameter_is_no_linear_layer(tmp_path: Path) -> None:
    bundle = Bundle(make_bundle(tmp_path))
    name, experts = MODULES[3].name, ParameterEntry("v", 0, 2)
    modules = [replace(each, parameter=experts) if each.name == name else each for each in bundle.manifest.modules]
    bundle.manifest = replace(bundle.manifest, modules=modules)
    reasons = unservable(bundle, {"linear", "conv", "embedding"})
    assert reasons["e"] == f"{name} is of a parameter and no module, which is not served"
    assert reasons.keys() == {"a", "h"} | {sketch.name for sketch in SKETCHES if 3 in sketch.modules}
    assert unservable(bundle, {"linear", "conv", "embedding", "parameter"}).keys() == {"a", "h"}


def test_alike_adapters_are_looked_at_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    reason = servable._reason
    monkeypatch.setattr(servable, "_reason", lambda *given: seen.append(given[1].name) or reason(*given))
    assert len(unservable(bundle, {"linear"})) == 8
    assert "plain" in seen
    assert "plainer" not in seen

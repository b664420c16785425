"""The rule by which an export keeps the original's ``target_modules`` is PEFT's own."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from lorazip_core.adapter.formats.target_modules import selection, selects
from lorazip_core.adapter.module import Module

NAMES = [
    "proj",
    "lm_head",
    "inner.proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.up_proj",
    "model.layers.1.mlp.experts.0.up_proj",
    "language_model.model.layers.1.self_attn.v_proj",
    "h.3.attn.c_attn",
]
TARGETS: list[Any] = [
    ["q_proj"],
    ["proj", "up_proj"],
    ["layers.1.self_attn.q_proj"],
    ["model.layers.0.self_attn.q_proj", "lm_head"],
    r".*language_model.*\.(q_proj|v_proj)",
    "q_proj",
    ".*",
]
RULES: list[dict[str, Any]] = [
    {},
    {"layers_to_transform": 1},
    {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"layers_to_transform": [3], "layers_pattern": ["layers", "h"]},
    {"layers_to_transform": []},
    {"exclude_modules": ["up_proj", "proj"]},
    {"exclude_modules": r".*\.0\..*"},
    {"modules_to_save": ["lm_head", "mlp"]},
]


def linear(name: str) -> Module:
    return Module(name, "linear", 4, 4)


@pytest.mark.parametrize(("targets", "rule"), list(itertools.product(TARGETS, RULES)))
def test_the_rule_is_that_of_peft(targets: Any, rule: dict[str, Any]) -> None:
    if isinstance(targets, str) and "layers_to_transform" in rule:
        pytest.skip("PEFT refuses both together")
    fields = {"target_modules": targets} | rule
    config = LoraConfig(**fields)
    for name in NAMES:
        assert selects(fields, linear(name)) == bool(check_target_module_exists(config, name)), name


@pytest.mark.parametrize("targets", [None, "", [], "(", 3, [3], {"a": 1}])
def test_what_selects_nothing(targets: Any) -> None:
    assert not selects({"target_modules": targets}, linear("model.layers.0.q_proj"))


def test_all_linear() -> None:
    config = {"target_modules": "all-linear"}
    assert selects(config, linear("model.layers.0.q_proj"))
    assert not selects(config, linear("lm_head"))
    assert not selects(config, Module("model.embed_tokens", "embedding", 4, 9))


def test_what_selects_all_stays() -> None:
    config = {"target_modules": ["q_proj", "not_there"], "exclude_modules": ["o_proj"], "layers_to_transform": [0]}
    assert selection(config, [linear("model.layers.0.q_proj")]) == {}


def test_full_paths_where_a_module_would_be_left_out() -> None:
    config = {"target_modules": ["q_proj"], "exclude_modules": ["o_proj"], "layers_to_transform": [0]}
    modules = [linear("model.layers.1.q_proj"), linear("model.layers.0.q_proj")]
    assert selection(config, modules) == {
        "target_modules": ["model.layers.0.q_proj", "model.layers.1.q_proj"],
        "exclude_modules": None,
        "layers_to_transform": None,
    }


def test_layer_0_alone_is_a_choice_of_layers() -> None:
    changed = selection({"target_modules": ["q_proj"], "layers_to_transform": 0}, [linear("model.layers.1.q_proj")])
    assert changed == {"target_modules": ["model.layers.1.q_proj"], "layers_to_transform": None}


def test_a_module_at_the_top_is_not_mistaken_for_one_below() -> None:
    changed = selection({"target_modules": ["other"]}, [linear("proj"), linear("inner.other")])
    assert changed == {"target_modules": r"inner\.other|proj"}
    assert not selects(changed, linear("inner.proj"))

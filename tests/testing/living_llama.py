"""Bundles of one tiny Llama that come out of each other, and what each of their adapters answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorazip_core.adapter.module import Module
from lorazip_core.bundle.reader import Bundle
from lorazip_core.compress.run import compress
from lorazip_core.maintain.add import AddOptions, add
from lorazip_core.planning.options import CompressOptions
from lorazip_core.serving.attach import attach
from testing import random_adapters as ra
from testing.random_bundle import EXTRA, Sketch, make_bundle
from testing.served_llama import MODULES, model
from testing.tiny_models import save_model

SOME = tuple(module for module in MODULES if module.name.rpartition(".")[2] in ("q_proj", "v_proj", "down_proj"))
FEWER = SOME[::2]
ENERGY = 0.12
OLD = tuple(ra.Recipe(f"old{i}", 3, SOME, group=i % 2, own=0.1, energy=ENERGY) for i in range(5))
NEW = tuple(ra.Recipe(f"new{i}", 2, (SOME, FEWER)[i % 2], group=i % 2, own=0.1, energy=ENERGY) for i in range(4))
NEWER = tuple(replace(recipe, name=f"newer{i}") for i, recipe in enumerate(NEW))
LONER = ra.Recipe("loner", 2, SOME, group=5, energy=ENERGY)
OTHER_MODULES = [Module("layers.0.q_proj", "linear", 24, 20)]
OTHERS = [
    Sketch("alien", "svd", [0], 3),
    Sketch("more", "svd", [0], 3, extras={EXTRA: torch.ones(2, 3)}),
]
BLOCK = 32
PROMPTS = torch.randint(7, 33, (3, 3 * BLOCK), generator=torch.Generator().manual_seed(1)).tolist()


class LivingLlama:
    """Bundles, and what each of their adapters answers, found out without a server."""

    def __init__(self, root: Path) -> None:
        self.model = save_model(root / "model", model())
        self.first, self.second, self.third = (root / f"bundle{number}" for number in range(3))
        """`OLD`; and `NEW`, too; and others of these names, and `LONER`."""
        compress(
            ra.write_collection(root / "old", OLD),
            self.first,
            CompressOptions(method="joint", rank=8, clusters=2, dtype="f32"),
        )
        add(self.first, ra.write_collection(root / "new", NEW), self.second, AddOptions())
        newer = ra.write_collection(root / "newer", (*NEWER, LONER))
        for was, now in zip(NEWER, NEW, strict=True):
            (newer / was.name).rename(newer / now.name)
        add(self.first, newer, self.third, AddOptions())
        self.others = make_bundle(root / "others", sketches=OTHERS, modules=OTHER_MODULES)
        self.tokens = {bundle: tokens(model(), bundle) for bundle in (self.first, self.second, self.third)}

    def engine(self, **settings: Any) -> dict[str, Any]:
        """Arguments of `vllm.LLM` for the first bundle, with these ``settings`` of lorazip's."""
        return {
            "model": str(self.model),
            "max_model_len": 128,
            "enable_lora": True,
            "max_loras": 8,
            "max_lora_rank": 1,
            "additional_config": {"lorazip": {"bundle": str(self.first), **settings}},
        }


def tokens(base: Any, path: Path) -> dict[str | None, list[list[int]]]:
    """What the adapters of a bundle answer, and none, on a model, to each of `PROMPTS`."""
    names = [None, *(adapter.name for adapter in Bundle(path).manifest.adapters)]
    rows = [(name, prompt) for name in names for prompt in PROMPTS]
    with attach(base, path) as served:
        ids = torch.tensor([prompt for _, prompt in rows])
        found = served.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            adapter_names=[name for name, _ in rows],
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )
    answers = found[:, len(PROMPTS[0]) :].tolist()
    each = len(PROMPTS)
    return {name: answers[each * place : each * (place + 1)] for place, name in enumerate(names)}

"""Weights of the base model are replaced while an engine runs: adapters stay, and are added to the new ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm.version", reason="needs vLLM (make test-vllm)")

import testing.engine_steps
from testing.engine import SMALL, run
from testing.living_llama import OLD, PROMPTS, LivingLlama, tokens
from testing.served_llama import model
from testing.tiny_models import save_model

pytestmark = pytest.mark.slow

SCRIPT = Path(testing.engine_steps.__file__)


def test_adapters_are_added_to_other_weights(living: LivingLlama, tmp_path: Path) -> None:
    other: Any = model()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    folder = save_model(tmp_path / "other", other)
    names = [None, *(recipe.name for recipe in OLD)]
    ask = ["ask", *([name, number, "lorazip:"] if name else None for number, name in enumerate(names))]
    first, then = ([of[name][0] for name in names] for of in (living.tokens[living.first], tokens(other, living.first)))
    assert all(one != another for one, another in zip(first, then, strict=True))
    steps = [ask, ["reload", str(folder)], ask, ["reload", str(living.model)], ask]
    engine = SMALL | living.engine()
    found = run(tmp_path, SCRIPT, {"engine": engine, "prompt": PROMPTS[0], "steps": steps})
    assert found == [first, None, then, None, first]

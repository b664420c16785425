"""Answers on tiny real models: as PEFT gives them, whatever the batches, and compared as the formulas say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from testing.peft_fixtures import load_adapter
from testing.tiny_models import gpt2, letters, llama, save_adapter, tokenizer
from torch import Tensor, nn

from lorazip_core.adapter.module import Module, Parameter
from lorazip_core.adapter.reader import open_adapter
from lorazip_core.model import batches as batching
from lorazip_core.model.base_model import BaseModel
from lorazip_core.model.bootstrap import SAMPLES, interval, resampled
from lorazip_core.model.fitting import misfit
from lorazip_core.model.hooks import Updates, applied
from lorazip_core.model.prompts import Example, Prompts
from lorazip_core.model.rows import Row
from lorazip_core.model.scoring import compare, score

MADE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (llama, {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"]}),
    "patterns": (
        llama,
        {
            "r": 4,
            "lora_alpha": 5,
            "use_rslora": True,
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"up_proj": 7},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
        },
    ),
    "embedding": (llama, {"r": 3, "lora_alpha": 6, "target_modules": ["embed_tokens", "k_proj"]}),
    "conv1d": (
        gpt2,
        {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True},
    ),
}


def updates(folder: Path) -> Updates:
    adapter = open_adapter(folder.name, folder)
    return {name: adapter.factors(name) for name in adapter.parts}


def base(model: nn.Module) -> BaseModel:
    return BaseModel("tiny", model, tokenizer(), torch.float32)


def examples(count: int = 8) -> list[Example]:
    prompts = Prompts(tokenizer())
    return [prompts.example(Row(row["input"], row["output"])) for row in letters(3, count)]


def nobody(count: int) -> None:
    pass


@pytest.mark.parametrize("name", MADE)
def test_hooks_give_the_logits_of_peft(name: str, tmp_path: Path) -> None:
    make, fields = MADE[name]
    save_adapter(tmp_path / "a", make(), **fields)
    ids = torch.tensor([example.ids[:6] for example in examples()])
    model = make()
    with torch.no_grad():
        before = model(ids).logits
        expected = load_adapter(tmp_path / "a", make())(ids).logits
        with applied(model, updates(tmp_path / "a")):
            found = model(ids).logits
        after = model(ids).logits
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(before, after)


def test_an_embedding_that_scales_scales_its_update() -> None:
    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * self.embed_scale

    model = nn.Sequential(Scaled(5, 4))
    b, a, ids = torch.randn(4, 2), torch.randn(2, 5), torch.tensor([[0, 3, 4]])
    with torch.no_grad():
        with applied(model, {"0": (b, a)}):
            found = model(ids)
        model[0].weight += (b @ a).mT  # type: ignore[operator]
        torch.testing.assert_close(found, model(ids))


def alone(model: nn.Module, example: Example) -> Tensor:
    """log p of each answer token, [answer, vocabulary], of one row without any padding."""
    with torch.no_grad():
        logits = model(torch.tensor([example.ids])).logits[0]
    return logits[example.prompt - 1 : -1].double().log_softmax(-1)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("tokens", [1, 60, 2048])
def test_batches_do_not_show_in_the_figures(
    make: Callable[[], nn.Module], tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "_TOKENS", tokens)
    targets = ["q_proj", "down_proj"] if make is llama else ["c_attn"]
    for seed in range(2):
        save_adapter(tmp_path / str(seed), make(), seed=seed, r=4, target_modules=targets)
    told: list[int] = []
    both = [updates(tmp_path / str(seed)) for seed in range(2)]
    one, other, divergence = compare(base(make()), examples(), both[0], both[1], told.append)
    as_it_is = score(base(make()), examples(), nobody)
    assert sum(told) == len(examples())
    models = [make(), *(load_adapter(tmp_path / str(seed), make()) for seed in range(2))]
    for place, example in enumerate(examples()):
        target = torch.tensor(example.ids[example.prompt :])
        rows = [alone(model, example) for model in models]
        for scores, row in zip((as_it_is, one, other), rows, strict=True):
            assert scores.loss[place] == pytest.approx(-float(row.gather(-1, target[:, None]).sum()), rel=1e-5)
            assert bool(scores.matches[place]) == bool((row.argmax(-1) == target).all())
        expected = float((rows[1].exp() * (rows[1] - rows[2])).sum())
        assert expected > 0.01
        assert divergence[place] == pytest.approx(expected, rel=1e-4)


def test_an_answer_that_greedy_decoding_gives_is_an_exact_match() -> None:
    model, example = llama(), examples()[0]
    ids = list(example.ids[: example.prompt])
    with torch.no_grad():
        for _ in range(3):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    right = Example(tuple(ids), example.prompt, False)
    wrong = Example((*ids[:-2], (ids[-2] + 1) % 30, ids[-1]), example.prompt, False)
    assert score(base(model), [wrong, right], nobody).matches.tolist() == [False, True]


def test_equal_updates_are_at_no_distance(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", llama(), r=4, target_modules=["q_proj"])
    one, other, divergence = compare(
        base(llama()), examples(), updates(tmp_path / "a"), updates(tmp_path / "a"), nobody
    )
    assert not divergence.any()
    assert (one.loss == other.loss).all()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Module("model.layers.0.self_attn.q_proj", "linear", 64, 64), None),
        (Module("model.embed_tokens", "embedding", 64, 33), None),
        (Module("model.layers.9.self_attn.q_proj", "linear", 64, 64), "1 of its modules are not in the model"),
        (Module("model.layers.0.self_attn.q_proj", "linear", 32, 64), "is it its base model"),
        (Module("model.embed_tokens", "linear", 64, 33), "to which no such update applies"),
        (Module("model.norm", "linear", 64, 64), "to which no such update applies"),
        (Module("experts.up.0", "linear", 4, 4, parameter=Parameter("up", 0, 2)), "a parameter of the model"),
    ],
)
def test_what_does_not_fit_is_named(module: Module, reason: str | None) -> None:
    found = misfit(llama(), [module])
    assert found is None if reason is None else reason in str(found)


def test_the_interval_is_that_of_rows_drawn_one_by_one() -> None:
    """Against a plain bootstrap, whose rows are drawn as indices."""
    rng = np.random.default_rng(1)
    original = rng.random(40) < 0.8
    compressed = np.where(rng.random(40) < 0.1, ~original, original)
    drawn = rng.integers(0, 40, (SAMPLES, 40))
    expected = np.percentile(compressed[drawn].mean(1) / original[drawn].mean(1), [2.5, 97.5])
    found = interval(resampled("a", original, compressed))
    assert found == pytest.approx(expected, abs=0.01)
    assert found == interval(resampled("a", original, compressed))
    assert found[0] < compressed.mean() / original.mean() < found[1]
    assert interval(resampled("a", original, original)) == (1.0, 1.0)
    assert interval(resampled("a", np.zeros(5, bool), np.zeros(5, bool))) is None

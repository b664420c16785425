"""Logits of tiny random models with adapters on them, by whatever PEFT the interpreter that runs this has.

    python found_logits.py JOBS.json ANSWERS.pt

JOBS.json is a list of [model, folder]; ANSWERS.pt a list of the logits, or of the error as text. Nothing of lorazip is
imported: PEFT 0.13 lives in an environment of its own. Logits are compared within one run only, since releases of
Transformers initialise models differently.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A backbone ``enc`` and a head with the counters of a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        self.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = nn.functional.one_hot(tokens.flatten() % 16, 16).to(self.enc[0].weight.dtype)
        return self.head(torch.tanh(self.enc(x)))


def _llama(hidden: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def _gemma() -> nn.Module:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def _qwen_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return Qwen3MoeForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "net": Net,
    "llama": lambda: _llama(32),
    "wide llama": lambda: _llama(64),
    "gemma": _gemma,
    "qwen moe": _qwen_moe,
}


SINGLE = ("qwen moe",)  # whose grouped products exist up to float32 only


def logits(model: str, folder: str | None) -> Tensor:
    """What ``model`` answers with the adapter in ``folder`` on it, in float64 where its layers can."""
    from peft import PeftModel

    torch.manual_seed(0)
    adapted: nn.Module = MODELS[model]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(adapted.named_parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    if folder is not None:
        adapted = PeftModel.from_pretrained(adapted, folder)
    tokens = torch.arange(1, 96, 7)[None]
    with torch.no_grad():
        answer = adapted.eval().to(torch.float32 if model in SINGLE else torch.float64)(tokens)
    return getattr(answer, "logits", answer)


def main(jobs: Path, answers: Path) -> None:
    warnings.simplefilter("ignore")
    found: list[Tensor | str] = []
    for model, folder in json.loads(jobs.read_text()):
        try:
            found.append(logits(model, folder))
        except Exception as error:  # whatever a release of PEFT or Transformers raises: the comparison is of who loads
            found.append(f"{type(error).__name__}: {error}")
    torch.save(found, answers)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Tiny causal models with a tokenizer, saved as Transformers does, and adapters that PEFT makes on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn, random
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from testing.peft_fixtures import quiet, save_adapter

WORDS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
SPECIAL = ["<s>", "</s>", "<|start|>", "<|end|>", "user", "assistant", "system"]
TEMPLATE = (
    "{% for m in messages %}<|start|> {{ m['role'] }} {{ m['content'] }} <|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|> assistant {% endif %}"
)
SIZE = 64


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token for each letter; the end of a turn is not the end of a text."""
    words = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="</s>",
        bos_token="<s>",
        pad_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )
    made.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    made.chat_template = template
    return made


def llama(layers: int = 2, **others: int) -> nn.Module:
    """One of ``SIZE``, or what ``others`` say in the words of its configuration."""
    sizes = {"hidden_size": SIZE, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2} | others
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        num_hidden_layers=layers,
        max_position_embeddings=128,
        initializer_range=0.15,
        **sizes,
    )
    return _seeded(lambda: LlamaForCausalLM(config))


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=len(SPECIAL) + len(WORDS), n_positions=128, n_embd=SIZE, n_layer=2, n_head=4, initializer_range=0.15
    )
    return _seeded(lambda: GPT2LMHeadModel(config))


def _seeded(make: Any) -> nn.Module:
    with random.fork_rng():
        random.manual_seed(0)
        return make().eval()


def save_model(folder: Path, model: Any, template: str | None = TEMPLATE) -> Path:
    """Write a model with its tokenizer; returns ``folder``."""
    with quiet():
        model.save_pretrained(folder)
        tokenizer(template).save_pretrained(folder)
    return folder


def save_rows(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def letters(seed: int, count: int = 6, words: int = 5) -> list[dict[str, str]]:
    """Rows of letters, always the same for a seed; the outputs are of one to three of them."""

    def word(*at: int) -> str:
        return WORDS[hash((seed, *at)) % len(WORDS)]

    return [
        {
            "input": " ".join(word(row, place) for place in range(words + row % 3)),
            "output": " ".join(word(row, place, 7) for place in range(1 + row % 3)),
        }
        for row in range(count)
    ]


__all__ = ["SIZE", "gpt2", "letters", "llama", "save_adapter", "save_model", "save_rows", "tokenizer"]

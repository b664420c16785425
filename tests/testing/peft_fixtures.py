"""Small real adapters, made with PEFT on random models that exist in memory only."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Embedding, LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x + self.q(x))))


class Tokens(nn.Module):
    """An embedding, two blocks and a head: linear layers with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 12)
        self.layers = nn.ModuleList(Block(12) for _ in range(2))
        self.head = nn.Linear(12, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Image(nn.Module):
    """Two convolutions, of kernel 3x2 and 1x1, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, (3, 2), stride=2, padding=1)
        self.mix = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(torch.tanh(self.stem(pixels)))).mean((2, 3)))


class Twins(nn.Module):
    """A layer ``proj`` at the top, and another of the same name further down."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(12, 12)
        self.inner = nn.ModuleDict({"proj": nn.Linear(12, 12), "other": nn.Linear(12, 12)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["other"](torch.tanh(self.inner["proj"](torch.tanh(self.proj(x)))))


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def tokens() -> nn.Module:
    return _seeded(Tokens)


def image() -> nn.Module:
    return _seeded(Image)


def twins() -> nn.Module:
    return _seeded(Twins)


_LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def llama() -> nn.Module:
    return _seeded(lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA)))


def llama_classifier() -> nn.Module:
    return _seeded(lambda: LlamaForSequenceClassification(LlamaConfig(**_LLAMA, num_labels=3)))


def gpt2() -> nn.Module:
    return _seeded(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)))


def sample_input(model: nn.Module) -> Tensor:
    """An input that ``model`` takes, always the same."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, Image):
        return torch.randn(2, 3, 8, 8, generator=generator)
    if isinstance(model, Twins):
        return torch.randn(4, 12, generator=generator)
    return torch.randint(1, 20, (2, 7), generator=generator)


def logits(model: nn.Module, base: nn.Module) -> Tensor:
    """What ``model`` (perhaps wrapped by PEFT) answers to the sample input of ``base``."""
    with torch.no_grad():
        out = model(sample_input(base))
    return getattr(out, "logits", out)


def randomise(model: nn.Module, seed: int) -> None:
    """Give everything that training would have changed a random value, so that no factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad or "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns about models that are not on a hub; that is not what these tests are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save_adapter(folder: Path, base: nn.Module, seed: int = 0, dtype: torch.dtype | None = None, **fields: Any) -> Any:
    """Put a LoRA with the LoraConfig ``fields`` on ``base``, fill it, and have PEFT save it. Returns the PeftModel."""
    with quiet():
        model = get_peft_model(base, LoraConfig(**fields), autocast_adapter_dtype=False)
        randomise(model, seed)
        if dtype is not None:
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(dtype)
        model.eval()
        model.save_pretrained(folder)
    return model


def load_adapter(folder: Path, base: nn.Module) -> Any:
    with quiet():
        return PeftModel.from_pretrained(base, folder).eval()


def load_strictly(folder: Path, base: nn.Module) -> Any:
    """Load with PEFT, and fail if a tensor of the file is not used or a part of the adapter is not in the file."""
    model = load_adapter(folder, base)
    with quiet():
        result = model.load_adapter(folder, "default")
    missing = [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    assert not missing
    assert not result.unexpected_keys
    return model


def peft_updates(model: nn.Module) -> dict[str, Tensor]:
    """ΔW [d_out, d_in] of every adapted module, as PEFT itself would merge it."""
    updates = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            delta = layer.get_delta_weight("default").detach().float()
            if isinstance(layer, Embedding) or getattr(layer, "fan_in_fan_out", False):
                delta = delta.T
            updates[name.removeprefix("base_model.model.")] = delta.flatten(1)
    return updates


def edit_config(folder: Path, *, remove: tuple[str, ...] = (), **fields: Any) -> None:
    """Change ``adapter_config.json`` in place."""
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if key not in remove}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of an adapter in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def to_pickle(folder: Path) -> None:
    """Turn the weights into the pickle that old PEFT versions wrote."""
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def to_shards(folder: Path, count: int = 3) -> None:
    """Split the weights into shards with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {}
    for number in range(count):
        name = f"adapter_model-{number + 1:05}-of-{count:05}.safetensors"
        keys = sorted(tensors)[number::count]
        save_file({key: tensors[key] for key in keys}, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

"""A tiny Llama and a bundle of adapters of it, of all schemes and on several bases, for engines that serve them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorazip_core.adapter.module import Module
from lorazip_core.export.exporter import export
from testing.random_bundle import Clusters, Sketch, make_bundle
from testing.tiny_models import llama, save_model

LAYERS, WIDTH, MIDDLE = 4, 256, 384
SIZES = {"hidden_size": WIDTH, "intermediate_size": MIDDLE, "num_attention_heads": 8, "num_key_value_heads": 2}
_SHAPES = {
    "mlp.down_proj": (WIDTH, MIDDLE),
    "mlp.gate_proj": (MIDDLE, WIDTH),
    "mlp.up_proj": (MIDDLE, WIDTH),
    "self_attn.k_proj": (64, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (64, WIDTH),
}
MODULES = [
    Module(f"model.layers.{layer}.{name}", "linear", *shape)
    for layer in range(LAYERS)
    for name, shape in _SHAPES.items()
]
ALL = list(range(len(MODULES)))


def _having(*words: str) -> list[int]:
    return [index for index, module in enumerate(MODULES) if any(word in module.name for word in words)]


_JOINT, _DIAG, _ALONE = 0.2, 0.4, 0.008
"""Of updates that all change tokens: shared bases, which are random, keep little of them."""
SKETCHES = [
    Sketch("coded/a", "coded", ALL, 4, scale=_ALONE),
    Sketch("coded/b", "coded", _having("mlp"), 3, scale=2 * _ALONE, dropped=_having("layers.1.mlp")),
    Sketch("coded/c", "coded", _having("q_proj", "v_proj"), 2, scale=2 * _ALONE),
    Sketch("coded/d", "coded", _having("k_proj", "down_proj"), 1, scale=3 * _ALONE),
    Sketch("diag0", "diag", ALL, 3, scale=_DIAG),
    Sketch("diag1", "diag", _having("self_attn"), 4, scale=_DIAG),
    Sketch("diag2", "diag", _having("up_proj", "o_proj"), 2, scale=2 * _DIAG),
    Sketch("joint0", "joint", ALL, 3, scale=_JOINT),
    Sketch("joint1", "joint", _having("self_attn"), 5, scale=_JOINT),
    Sketch("joint2", "joint", _having("q_proj", "gate_proj"), 2, scale=2 * _JOINT),
    Sketch("joint3", "joint", _having("mlp", "v_proj"), 4, scale=_JOINT),
    Sketch("joint4", "joint", ALL, 1, scale=2 * _JOINT),
    Sketch("original0", "original", ALL, 2, scale=_ALONE),
    Sketch("original1", "original", _having("layers.2"), 7, scale=3 * _ALONE, dtype=torch.bfloat16),
    Sketch("svd0", "svd", ALL, 3, scale=_ALONE),
    Sketch("svd1", "svd", _having("layers.0", "layers.3"), 4, scale=2 * _ALONE),
    Sketch("svd2", "svd", _having("o_proj"), 2, scale=3 * _ALONE),
]
NAMES = [sketch.name for sketch in SKETCHES]
CLUSTERS: Clusters = (
    ("joint", [["joint0", "joint2"], ["joint1"]]),
    ("joint", [["joint3", "joint4"]]),
    ("diag", [["diag0", "diag2"]]),
    ("diag", [["diag1"]]),
)


class ServedLlama(NamedTuple):
    """Folders."""

    model: Path
    bundle: Path
    exported: Path
    """What vLLM takes as ordinary LoRAs, in float32."""


def model() -> Any:
    """It goes on after the end of a text, as an engine does that is to ignore that."""
    made: Any = llama(LAYERS, **SIZES)
    made.generation_config.eos_token_id = None
    return made


def make(root: Path, *, seed: int = 0, sketches: list[Sketch] = SKETCHES) -> ServedLlama:
    """``sketches`` are some of `SKETCHES`, or have their modules. Another ``seed`` gives other adapters and bases."""
    bundle = make_bundle(root, dtype="f32", seed=seed, sketches=sketches, modules=MODULES, clusters=CLUSTERS)
    export(bundle, root / "exported", target="vllm", dtype="f32")
    return ServedLlama(save_model(root / "model", model()), bundle, root / "exported")

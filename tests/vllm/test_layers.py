"""What the ranks of tensor parallel add to their parts of a layer is, together, what is added to the whole.

The layers are vLLM's own, each made as if its process were some rank of several; there is no process group, so what
the ranks compute is put together here, as their layers would do it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm.version", reason="needs vLLM (make test-vllm)")

from testing.random_bundle import Clusters, Sketch, make_bundle
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.attention.mla_attention import MLAAttention

from lorazip_core.adapter.module import Module
from lorazip_core.base.errors import LocalError
from lorazip_core.bundle.manifest import ModuleEntry
from lorazip_core.bundle.reader import Bundle
from lorazip_core.serving.resident import NONE, Resident
from lorazip_core.serving.store import AdapterStore
from lorazip_core.vllm.layers import layers_of, put_behind

HEADS, KV, HEAD, WIDTH, MIDDLE = 8, 2, 16, 40, 96
MODULES = [
    Module("mlp.down_proj", "linear", WIDTH, MIDDLE),
    Module("mlp.gate_proj", "linear", MIDDLE, WIDTH),
    Module("mlp.up_proj", "linear", MIDDLE, WIDTH),
    Module("self_attn.k_proj", "linear", KV * HEAD, WIDTH),
    Module("self_attn.o_proj", "linear", WIDTH, HEADS * HEAD),
    Module("self_attn.q_proj", "linear", HEADS * HEAD, WIDTH),
    Module("self_attn.v_proj", "linear", KV * HEAD, WIDTH),
    Module("x.column", "linear", 48, WIDTH),
    Module("x.replicated", "linear", 24, WIDTH),
]
ALL = list(range(len(MODULES)))
SKETCHES = [
    Sketch("coded", "coded", ALL, 3),
    Sketch("diag0", "diag", ALL, 3),
    Sketch("diag1", "diag", [0, 1, 3, 5], 2),
    Sketch("joint0", "joint", ALL, 4),
    Sketch("joint1", "joint", [2, 4, 6], 2),
    Sketch("original", "original", ALL, 2),
    Sketch("svd", "svd", [0, 3, 6, 8], 3),
]
CLUSTERS: Clusters = (("joint", [["joint0"]]), ("joint", [["joint1"]]), ("diag", [["diag0", "diag1"]]))
ROWS = [*range(len(SKETCHES)), NONE, *range(len(SKETCHES))[::-1]]


class Zero:
    """In place of the method of a layer, so that only what is added to it is seen."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return x.new_zeros(*x.shape[:-1], sum(layer.output_partition_sizes))


@contextmanager
def rank_of(rank: int, size: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(VllmConfig()):
        for module in (linear, parameter):
            patch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            patch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
        yield


def engine_model() -> nn.Module:
    """As vLLM makes one, with q, k and v in one layer, and gate and up."""
    made = nn.Module()
    made.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    made.self_attn, made.mlp, made.x = nn.Module(), nn.Module(), nn.Module()
    made.self_attn.qkv_proj = linear.QKVParallelLinear(WIDTH, HEAD, HEADS, KV, bias=False)
    made.self_attn.o_proj = linear.RowParallelLinear(HEADS * HEAD, WIDTH, bias=False)
    made.mlp.gate_up_proj = linear.MergedColumnParallelLinear(WIDTH, [MIDDLE, MIDDLE], bias=False)
    made.mlp.down_proj = linear.RowParallelLinear(MIDDLE, WIDTH, bias=False)
    made.x.column = linear.ColumnParallelLinear(WIDTH, 48, bias=False)
    made.x.replicated = linear.ReplicatedLinear(WIDTH, 24, bias=False)
    return made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = make_bundle(
        tmp_path_factory.mktemp("layers"), dtype="f32", sketches=SKETCHES, modules=MODULES, clusters=CLUSTERS
    )
    return Bundle(path)


def parts(bundle: Bundle, rank: int, size: int, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is added to each module by one rank."""
    with rank_of(rank, size):
        model = engine_model()
        layers = layers_of(model, bundle.manifest.modules)
        store = AdapterStore(bundle, layers, device=torch.device("cpu"), dtype=torch.float32)
    numbers = np.array([store.numbers[SKETCHES[row].name] if row != NONE else NONE for row in ROWS], np.int32)
    batch = torch.zeros(store.most_ints(len(ROWS) + 5), dtype=torch.int32)  # a batch is shorter than it can be
    of_rows = torch.from_numpy(store.batch(numbers))
    batch[: len(of_rows)] = of_rows
    named, found = dict(model.named_modules()), {}
    for number, layer in enumerate(layers):
        module = named[layer.name]
        module.quant_method = Zero()
        put_behind(module, store.calls(number), batch)
        x = inputs[layer.slices[0].module]
        if isinstance(module, linear.RowParallelLinear):
            x = x.chunk(size, dim=-1)[rank]
        y = module.quant_method.apply(module, x)
        for slice_ in layer.slices:
            found[slice_.module] = y[:, slice_.column : slice_.column + len(slice_.out)]
    return found


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_parts_of_all_ranks_are_the_whole(bundle: Bundle, size: int) -> None:
    """Of k and v, which have two heads here, several ranks compute the same part where there are more than two."""
    generator = torch.Generator().manual_seed(0)
    of_attention, of_middle, of_width = (
        torch.randn(len(ROWS), width, generator=generator) for width in (HEADS * HEAD, MIDDLE, WIDTH)
    )
    inputs = {module.name: of_width for module in MODULES}
    inputs |= {"self_attn.o_proj": of_attention, "mlp.down_proj": of_middle}
    ranks = [parts(bundle, rank, size, inputs) for rank in range(size)]
    resident = Resident.of(bundle, torch.device("cpu"))
    rows = torch.tensor([resident.rows[SKETCHES[row].name] if row != NONE else NONE for row in ROWS])
    for module in MODULES:
        whole = resident.apply(module.name, inputs[module.name], rows)
        own = [rank[module.name] for rank in ranks]
        match module.name.partition(".")[2]:
            case "down_proj" | "o_proj":
                together = torch.stack(own).sum(0)
            case "replicated":
                together = own[0]
                assert all(torch.equal(each, together) for each in own)
            case "k_proj" | "v_proj" if size > KV:
                copies = size // KV
                assert all(torch.equal(each, own[rank // copies * copies]) for rank, each in enumerate(own))
                together = torch.cat(own[::copies], -1)
            case _:
                together = torch.cat(own, -1)
        torch.testing.assert_close(together, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))
        assert (together[ROWS.index(NONE)] == 0).all()


def test_an_adapter_that_comes_later_is_the_whole_too(bundle: Bundle) -> None:
    """In the place of another one, of which nothing is left."""
    with rank_of(1, 2):
        store = AdapterStore(
            bundle, layers_of(engine_model(), bundle.manifest.modules), device=torch.device("cpu"), dtype=torch.float32
        )
    at_first = _state(store)
    for adapter in bundle.manifest.adapters:
        number = store.numbers[adapter.name]
        store.remove(number)
        assert store.add(bundle, adapter) == number
    for was, now in zip(at_first, _state(store), strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0)


def _state(store: AdapterStore) -> list[Tensor]:
    return [
        tensor.clone() for layer in range(len(store.layers)) for call in store.calls(layer) for tensor in call.tensors
    ]


@pytest.mark.parametrize(
    ("module", "size", "line"),
    [
        (Module("self_attn.qkv_proj", "linear", (HEADS + 2 * KV) * HEAD, WIDTH), 1, None),
        (Module("self_attn.qkv_proj", "linear", (HEADS + 2 * KV) * HEAD, WIDTH), 2, "has 3 parts in the engine and 1"),
        (Module("x.column", "linear", 24, WIDTH), 2, r"is \[24, 40\] in the bundle, but \[48, 40\] in the model"),
        (Module("x.other", "linear", 24, WIDTH), 1, r"1 of 1 modules of the bundle are no linear layers"),
    ],
)
def test_modules_that_do_not_fit(module: Module, size: int, line: str | None) -> None:
    entry = ModuleEntry(name=module.name, kind="linear", d_out=module.d_out, d_in=module.d_in, kernel=[])
    with rank_of(0, size):
        model = engine_model()
        if module.name.endswith("qkv_proj"):
            model.packed_modules_mapping = {}
        if line is None:
            [layer] = layers_of(model, [entry])
            assert [(each.module, len(each.out)) for each in layer.slices] == [(module.name, module.d_out)]
        else:
            with pytest.raises(LocalError, match=line):
                layers_of(model, [entry])


def test_a_layer_whose_weight_attention_multiplies_into_others_is_refused() -> None:
    """Only when a prompt is read is it called: tokens after that would be those of no adapter."""
    entry = ModuleEntry(name="x.column", kind="linear", d_out=48, d_in=WIDTH, kernel=[])
    with rank_of(0, 1):
        model = engine_model()
        assert len(layers_of(model, [entry])) == 1
        model.x.attention = MLAAttention.__new__(MLAAttention)
        nn.Module.__init__(model.x.attention)
        model.x.attention.kv_b_proj = model.x.column
        with pytest.raises(LocalError, match=r"layer x\.column of the model is multiplied into others"):
            layers_of(model, [entry])

"""A model that serves all adapters of a bundle at once answers as PEFT does with each of them exported."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from testing.broken import edit_manifest
from testing.peft_fixtures import edit_weights, load_adapter, quiet, save_adapter
from testing.random_bundle import Sketch, make_bundle
from testing.tiny_models import gpt2, llama
from torch import Tensor, nn

from lorazip_core.adapter.module import Module
from lorazip_core.base.errors import BundleDamaged, LocalError, Unsupported, UsageError
from lorazip_core.bundle.decoder import decode
from lorazip_core.bundle.reader import Bundle
from lorazip_core.compress.run import compress
from lorazip_core.export.exporter import export
from lorazip_core.model.hooks import applied, on_device
from lorazip_core.model.inputs import summing
from lorazip_core.planning.options import CompressOptions
from lorazip_core.schemes.registry import SCHEMES
from lorazip_core.serving.attach import attach, detach
from lorazip_core.serving.served import _TOKENS, NO_ADAPTER, Served

MODULES = [
    Module("lm_head", "linear", 33, 64),
    Module("model.embed_tokens", "embedding", 64, 33),
    Module("model.layers.0.self_attn.q_proj", "linear", 64, 64),
    Module("model.layers.0.self_attn.v_proj", "linear", 32, 64),
    Module("model.layers.1.mlp.down_proj", "linear", 64, 96),
]
SKETCHES = [
    Sketch("coded/a", "coded", [0, 1, 2, 3, 4], 4, scale=0.05),
    Sketch("coded/b", "coded", [2, 3, 4], 3, scale=0.05, dropped=[3]),
    Sketch("d", "joint", [2, 4], 4, scale=0.05),
    Sketch("e", "diag", [1, 2, 3], 3, scale=0.1),
    Sketch("original", "original", [0, 2, 4], 3, scale=0.05, dtype=torch.bfloat16),
    Sketch("svd", "svd", [1, 3, 4], 5, scale=0.05),
    Sketch("z", "joint", [0, 1, 2, 3], 2, scale=0.05),
]
NAMES = [sketch.name for sketch in SKETCHES]
MIXED = ["coded/a", None, "e", "z", "coded/b", "original", NO_ADAPTER, "svd", "d", "coded/a"]
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


class Case:
    """A bundle, its adapters exported, and how to make the model that they are for."""

    def __init__(self, bundle: Path, exported: Path, model: Callable[[], nn.Module]) -> None:
        self.bundle, self.model = bundle, model
        export(bundle, exported, dtype="f32")
        self.exported = exported

    def alone(self, name: str | None) -> Any:
        """The model with one adapter, by PEFT."""
        base = self.model()
        return base if name in (None, NO_ADAPTER) else load_adapter(self.exported / str(name), base)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """All schemes on a Llama, embedding and head among the modules."""
    root = tmp_path_factory.mktemp("mixed")
    bundle = make_bundle(root, dtype="f32", sketches=SKETCHES, modules=MODULES)
    assert {adapter.scheme for adapter in Bundle(bundle).manifest.adapters} == SCHEMES.keys()
    return Case(bundle, root / "exported", llama)


@pytest.fixture(scope="module")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Clusters, and adapters that are in none, on a GPT-2 with Conv1D layers and tied embeddings."""
    root = tmp_path_factory.mktemp("clustered")
    for number, name in enumerate("abcdef"):
        own = {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
        save_adapter(root / "adapters" / name, gpt2(), number if number > 3 else number // 2, **own)
        edit_weights(root / "adapters" / name, lambda tensors, by=1 + number: _scale(tensors, 0.02 * by))
    compress(
        root / "adapters",
        root / "bundle",
        CompressOptions(method="joint", rank=2, clusters=3, max_error=0.01, dtype="f32"),
    )
    return Case(root / "bundle", root / "exported", gpt2)


def _scale(tensors: dict[str, Tensor], by: float) -> None:
    tensors.update({key: tensor * by if "lora_B" in key else tensor for key, tensor in tensors.items()})


@pytest.fixture
def served(case: Case) -> Iterator[Served]:
    with attach(case.model(), case.bundle) as found:
        yield found


def tokens(count: int, length: int = 7) -> Tensor:
    return torch.randint(7, 33, (count, length), generator=torch.Generator().manual_seed(5))


def padded(count: int) -> dict[str, Tensor]:
    """Inputs of uneven lengths, padded on the left."""
    ids = tokens(count)
    mask = torch.ones_like(ids)
    for row in range(count):
        mask[row, : row % 4] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    with quiet():
        return model.generate(**inputs, **GREEDY | options)


def test_rows_of_a_batch_have_their_own_adapters(case: Case, served: Served) -> None:
    ids = tokens(len(MIXED))
    with served.rows(MIXED):
        found = logits(served.model, ids)
    base = logits(case.model(), ids)
    for row, name in enumerate(MIXED):
        expected = logits(case.alone(name), ids)[row]
        torch.testing.assert_close(found[row], expected, rtol=2e-4, atol=2e-4)
        assert (float((expected - base[row]).abs().max()) > 0.1) == (name not in (None, NO_ADAPTER))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_what_is_generated(case: Case, served: Served, options: dict[str, Any]) -> None:
    inputs = padded(len(MIXED))
    if options.get("cache_implementation") == "static":
        options = options | {"disable_compile": True}
    with quiet():
        found = served.generate(**inputs, **GREEDY | options, adapter_names=MIXED)
    each = options.get("num_return_sequences", 1)
    assert len(found) == each * len(MIXED)
    for row, name in enumerate(MIXED):
        own = slice(row * each, (row + 1) * each)
        assert found[own].tolist() == generated(case.alone(name), inputs, **options)[own].tolist(), name


def test_samples_are_those_of_peft_with_the_same_adapters(case: Case, served: Served) -> None:
    names = ["svd", NO_ADAPTER, "d", "svd"]
    model = load_adapter(case.exported / "svd", case.model())
    with quiet():
        for name in ("svd", "d"):
            model.load_adapter(case.exported / name, name)
    inputs = padded(len(names))

    def sampled(generate: Callable[..., Tensor], repeats: int = 1, **options: Any) -> list[list[int]]:
        torch.manual_seed(3)
        given = {name: tensor.repeat_interleave(repeats, 0) for name, tensor in inputs.items()}
        own = [name for name in names for _ in range(repeats)]
        options = GREEDY | {"do_sample": True, "max_new_tokens": 12, "min_new_tokens": 12} | options
        with quiet(), torch.no_grad():
            return generate(**given, **options, adapter_names=own).tolist()

    assert sampled(served.generate) == sampled(model.generate)
    twice = sampled(served.generate, num_return_sequences=2)
    assert twice == sampled(model.generate, 2)
    assert twice[0] != twice[1]


def test_clusters_and_transposed_layers(clustered: Case) -> None:
    entries = Bundle(clustered.bundle).manifest.adapters
    assert {0, 1, None} <= {entry.cluster for entry in entries}
    names = [*(entry.name for entry in entries), None]
    inputs = padded(len(names))
    with attach(clustered.model(), Bundle(clustered.bundle)) as served:
        assert served.names == names[:-1]
        found = served.generate(**inputs, **GREEDY, adapter_names=names)
        with served.rows(names):
            of_served = logits(served.model, inputs["input_ids"])
    for row, name in enumerate(names):
        model = clustered.alone(name)
        assert found[row].tolist() == generated(model, inputs)[row].tolist()
        torch.testing.assert_close(of_served[row], logits(model, inputs["input_ids"])[row], rtol=2e-4, atol=2e-4)


def test_a_name_is_for_as_many_sequences_as_there_are_for_each(served: Served) -> None:
    ids = tokens(6)
    with served.rows(["svd", None, "e"]):
        found = logits(served.model, ids)
    with served.rows(["svd", "svd", None, None, "e", "e"]):
        assert torch.equal(logits(served.model, ids), found)


def test_it_is_the_base_model_without_rows_and_after_it_is_detached(case: Case) -> None:
    model, ids = case.model(), tokens(3)
    before, hooks = logits(model, ids), [len(module._forward_hooks) for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    served = attach(model, str(case.bundle), device="cpu")
    assert torch.equal(logits(model, ids), before)
    assert torch.equal(served.generate(ids, **GREEDY, adapter_names=[None] * 3), generated(model, {"input_ids": ids}))
    with served.rows(["d", "z", None]):
        assert not torch.equal(logits(model, ids)[:2], before[:2])
        served.detach()
        assert torch.equal(logits(model, ids), before)
    served.detach()
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(UsageError, match="detached"), served.rows(["d"]):
        pass
    with attach(model, case.bundle) as again, again.rows(["d"]):
        assert not torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), before)


def test_blocks_are_nested_and_end_with_what_is_raised(served: Served) -> None:
    ids = tokens(1)
    found = {}
    for name in ("svd", "d", None):
        with served.rows([name]):
            found[name] = logits(served.model, ids)
    with served.rows(["svd"]):
        with pytest.raises(RuntimeError), served.rows(["d"]):
            served.model(input_ids=ids, inputs_embeds=ids.float() @ torch.ones(2, 3))
        assert torch.equal(logits(served.model, ids), found["svd"])
    assert torch.equal(logits(served.model, ids), found[None])


def test_threads_do_not_see_each_others_rows(served: Served) -> None:
    ids = tokens(2)
    found: dict[str | None, Tensor] = {}

    def ask(name: str | None) -> None:
        with served.rows([name, None]):
            found[name] = logits(served.model, ids)

    with served.rows(["svd", "d"]):
        threads = [threading.Thread(target=ask, args=(name,)) for name in ("z", None)]
        bare = threading.Thread(target=lambda: found.update(bare=logits(served.model, ids)))
        for thread in (*threads, bare):
            thread.start()
            thread.join()
    with served.rows(["z", None]):
        assert torch.equal(found["z"], logits(served.model, ids))
    assert torch.equal(found["bare"], logits(served.model, ids))
    assert torch.equal(found[None], found["bare"])


def test_two_models_serve_at_the_same_time(case: Case, served: Served, clustered: Case) -> None:
    ids = tokens(2)
    with attach(clustered.model(), clustered.bundle) as other, served.rows(["d", None]), other.rows(["a", "b"]):
        found = logits(served.model, ids), logits(other.model, ids)
    torch.testing.assert_close(found[0][0], logits(case.alone("d"), ids)[0], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(found[1][1], logits(clustered.alone("b"), ids)[1], rtol=2e-4, atol=2e-4)


def test_what_is_held_is_used_as_it_is(served: Served) -> None:
    """Serving makes nothing of an adapter that stays."""
    held = served.nbytes
    pointers = [tensor.data_ptr() for tensor in served._resident._tensors()]
    with served.rows(["coded/a"]):
        logits(served.model, tokens(1))
    assert [tensor.data_ptr() for tensor in served._resident._tensors()] == pointers
    assert served.nbytes == held == sum({id(each): each.nbytes for each in served._resident._tensors()}.values())


def test_a_model_in_bf16_is_computed_with_in_float32(case: Case) -> None:
    """Of an update, only what is added is rounded; under autocast as well."""
    model, ids = case.model(), tokens(2)
    with attach(model, case.bundle) as served, served.rows(["svd", "coded/a"]):
        layer = model.get_submodule(MODULES[2].name)
        seen: list[tuple[Tensor, Tensor]] = []
        layer.register_forward_hook(lambda layer, given, y: seen.append((given[0], y)))
        with torch.autocast("cpu", torch.bfloat16):
            logits(model, ids)
        x, y = seen[0]
        batch = served._resident.batch(torch.tensor([served._resident.rows[name] for name in ("svd", "coded/a")]))
        update = served._resident.apply(MODULES[2].name, x, batch)
        with torch.autocast("cpu", torch.bfloat16):
            plain = nn.functional.linear(x, layer.weight)
        assert torch.equal(y, plain + update.to(plain.dtype))


@pytest.mark.parametrize("options", [{}, {"fullgraph": True}], ids=str)
def test_a_served_model_is_not_compiled(served: Served, options: dict[str, Any]) -> None:
    """Compiled code that has no hook, of one layer, would be used for another that has one."""
    compiled = torch.compile(served.model, backend="eager", **options)
    with served.rows(["d"]), pytest.raises(Exception, match="a bundle is attached to cannot be compiled"):
        logits(compiled, tokens(1))
    torch.compiler.reset()


def test_a_compiled_model_is_refused(case: Case) -> None:
    within = case.model()
    within.model.layers[1].compile()
    for model in (torch.compile(case.model()), within):
        with pytest.raises(UsageError, match="compiled"):
            attach(model, case.bundle)


def test_a_model_that_can_checkpoint_gradients(case: Case, served: Served) -> None:
    """It does so in training only."""
    ids = tokens(2)
    with served.rows(["svd", "d"]):
        before = logits(served.model, ids)
        served.model.gradient_checkpointing_enable()
        assert torch.equal(logits(served.model, ids), before)


def test_some_adapters_only(case: Case) -> None:
    with attach(case.model(), case.bundle, only=["coded/*", "svd"]) as served:
        assert served.names == ["coded/a", "coded/b", "svd"]
        ids = tokens(2)
        with served.rows(["svd", "coded/b"]):
            found = logits(served.model, ids)
        with pytest.raises(UsageError, match="what is served has no adapter 'd'"), served.rows(["d"]):
            pass
    torch.testing.assert_close(found[1], logits(case.alone("coded/b"), ids)[1], rtol=2e-4, atol=2e-4)
    for only, message in (
        ([], "leaves no adapter"),
        ("svd", r"'svd' is one name, .* .write \['svd'\]"),
        (["svdd"], "no adapter 'svdd' .did you mean 'svd'"),
    ):
        with pytest.raises(UsageError, match=message):
            attach(case.model(), case.bundle, only=only)


def test_wrong_rows(served: Served) -> None:
    with pytest.raises(UsageError, match=r"no adapter 'codes/a' \(did you mean 'coded/a'"), served.rows(["codes/a"]):
        pass
    with pytest.raises(UsageError, match=r"'qqq' \(Served.names lists them\)"), served.rows(["qqq"]):
        pass
    with pytest.raises(UsageError, match="no rows"), served.rows([]):
        pass
    with pytest.raises(UsageError, match=r"'d' is one name, not a list of names \(write \['d'\]\)"), served.rows("d"):
        pass
    with pytest.raises(UsageError, match="'svd' is one name"):
        served.generate(tokens(3), adapter_names="svd", **GREEDY)
    with pytest.raises(UsageError, match="2 adapter names for 3 inputs"):
        served.generate(tokens(3), adapter_names=["svd", "d"], **GREEDY)
    for inputs in ({"inputs": tokens(4)}, padded(4)):
        with pytest.raises(UsageError, match="2 adapter names for 4 inputs"):
            served.generate(**inputs, adapter_names=["svd", "d"], **GREEDY)
    for names in (["svd", "d"], [None, NO_ADAPTER]):
        with pytest.raises(UsageError, match="a batch of 3 is no multiple of the 2 rows"), served.rows(names):
            logits(served.model, tokens(3))


def test_a_model_has_one_bundle(case: Case, served: Served) -> None:
    with pytest.raises(UsageError, match="attached to this model already"):
        attach(served.model, case.bundle)


def test_a_model_is_detached_by_whoever_has_it(case: Case) -> None:
    """Also as a part of another one, and when nothing but its hooks has what `attach` returned."""
    model, ids = case.model(), tokens(1)
    detach(model)  # from which nothing is to be detached
    attach(model, case.bundle)
    gc.collect()
    with pytest.raises(UsageError, match=r"attached to this model already .detach it first: .*detach\(model\)"):
        attach(model, case.bundle)
    detach(nn.ModuleDict({"within": model}))
    assert not any(module._forward_hooks for module in model.modules())
    with attach(model, case.bundle) as served, served.rows(["d"]):
        assert not torch.equal(logits(model, ids), logits(case.model(), ids))
        detach(model)
        assert torch.equal(logits(model, ids), logits(case.model(), ids))


def test_a_model_that_is_dropped_is_not_kept(case: Case) -> None:
    served = attach(case.model(), case.bundle)
    of_model, of_served = ref(served.model), ref(served)
    del served
    gc.collect()
    assert of_model() is of_served() is None


def test_a_device_that_is_not_there(case: Case) -> None:
    count = torch.cuda.device_count()
    for device in (f"cuda:{count}", torch.device("cuda", count)):
        with pytest.raises(LocalError, match=f"cuda:{count}: not there"):
            attach(case.model(), case.bundle, device=device)
    with pytest.raises(UsageError, match="choose auto, cpu, cuda"):
        attach(case.model(), case.bundle, device="gpu")


def test_a_manifest_that_contradicts_itself(case: Case, tmp_path: Path) -> None:
    shutil.copytree(case.bundle, tmp_path / "bundle")
    edit_manifest(tmp_path / "bundle", lambda m: m["requires"]["export"].remove("embedding"))
    with pytest.raises(BundleDamaged, match="contradicts itself: the kind embedding is in use"):
        attach(case.model(), tmp_path / "bundle")


class Lenient(nn.Linear):
    def forward(self, input: Tensor, more: int = 0) -> Tensor:
        return super().forward(input)


class Calling(nn.Module):
    """A model that calls its layers with the names of their arguments, or without."""

    def __init__(self, *, by_name: bool, **more: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.layer, self.by_name, self.more = nn.Embedding(16, 8), Lenient(8, 8), by_name, more

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(input=ids) if self.by_name else self.table(ids)
        y: Tensor = self.layer(input=x, **self.more) if self.by_name else self.layer(x)
        return y


def test_layers_that_are_called_with_names(tmp_path: Path) -> None:
    """Wherever an update is applied, and inputs are looked at."""
    modules = [Module("layer", "linear", 8, 8), Module("table", "embedding", 8, 16)]
    bundle = Bundle(make_bundle(tmp_path, sketches=[Sketch("a", "svd", [0, 1], 2)], modules=modules))
    [entry] = bundle.manifest.adapters
    updates = {module.name: decode(bundle, entry, module) for module in bundle.modules(entry)}
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    found = []
    with torch.no_grad():
        for by_name in (False, True):
            model = Calling(by_name=by_name)
            with attach(model, bundle) as served, served.rows(["a", None]):
                found.append([model(ids)])
            with applied(model, on_device(updates, torch.device("cpu"), torch.float32)):
                found[-1].append(model(ids))
            with summing(model, ["layer"]) as sums:
                found[-1].append(model(ids))
            found[-1].append(sums["layer"].total)
    assert all(map(torch.equal, *found))
    assert not torch.equal(found[0][0], found[0][2])
    model = Calling(by_name=True, more=1)
    message = "layer was called with input, more: its input has to be the first argument"
    with attach(model, bundle) as served, served.rows(["a"]), pytest.raises(UsageError, match=message):
        model(ids)


def test_another_model(case: Case, clustered: Case, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not fit this model: 5 of its modules are not in the model: lm_head"):
        attach(nn.Module(), case.bundle)
    with pytest.raises(UsageError, match=r"down_proj"):
        attach(llama(1), case.bundle)
    model = case.model()
    model.model.layers[0].self_attn.v_proj = nn.Linear(64, 40)
    with pytest.raises(UsageError, match=r"v_proj is linear \[32, 64\], but in the model \[40, 64\]"):
        attach(model, case.bundle)
    assert not any(module._forward_hooks for module in model.modules())


class Scaled(nn.Embedding):
    """As Gemma's."""

    embed_scale = 3.0

    def forward(self, given: Tensor) -> Tensor:
        return super().forward(given) * self.embed_scale


def test_an_embedding_that_scales_what_it_looks_up(case: Case) -> None:
    """In a sequence longer than is looked up at a time."""
    model: Any = case.model()
    scaled = Scaled(*model.model.embed_tokens.weight.shape)
    scaled.weight = model.model.embed_tokens.weight
    model.model.embed_tokens = scaled
    bundle, ids = Bundle(case.bundle), tokens(2, _TOKENS + 6)
    [entry] = [each for each in bundle.manifest.adapters if each.name == "coded/a"]
    updates = {module.name: decode(bundle, entry, module) for module in bundle.modules(entry)}
    with applied(model, on_device(updates, torch.device("cpu"), torch.float32)):
        expected = logits(model, ids)
    with attach(model, bundle) as served, served.rows(["coded/a"]):
        torch.testing.assert_close(logits(model, ids), expected, rtol=2e-4, atol=2e-4)


def test_a_batch_for_the_base_model_costs_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served._resident, "apply", None)
    with served.rows([None, NO_ADAPTER]):
        logits(served.model, tokens(2))


def test_experts_get_tokens_without_rows(tmp_path: Path) -> None:
    modules = [Module("mlp.experts.3.up_proj", "linear", 8, 8), Module("mlp.up_proj", "linear", 8, 8)]
    sketches = [Sketch("a", "svd", [0, 1], 2), replace(SKETCHES[5], name="b", modules=[1])]
    bundle = make_bundle(tmp_path, sketches=sketches, modules=modules)
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(8, 8)})})
    model["mlp"].experts = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(8, 8)}) for _ in range(4))
    with pytest.raises(Unsupported, match=r"1 of 2 adapters cannot .*'a': mlp.experts.3.up_proj is of an expert"):
        attach(model, bundle)
    attach(model, bundle, only=["b"]).detach()


def tied_llama() -> Any:
    """Its head is its embedding, to which alone the updates of the embedding apply."""
    model: Any = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def test_a_copy_of_the_embedding_has_to_be_the_models(tmp_path: Path) -> None:
    """PEFT saves one beside a LoRA on it; another one would be an embedding that was trained or has more tokens."""
    save_adapter(tmp_path / "adapters" / "a", tied_llama(), r=2, target_modules=["embed_tokens", "q_proj"])
    compress(tmp_path / "adapters", tmp_path / "bundle", CompressOptions(method="svd", rank=2, dtype="f32"))
    case = Case(tmp_path / "bundle", tmp_path / "exported", tied_llama)
    ids = tokens(2)
    with attach(tied_llama(), case.bundle) as served, served.rows(["a", None]):
        found = logits(served.model, ids)
    torch.testing.assert_close(found[0], logits(case.alone("a"), ids)[0], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(found[1], logits(tied_llama(), ids)[1])
    attach(tied_llama().half(), case.bundle).detach()
    other = tied_llama()
    with torch.no_grad():
        other.model.embed_tokens.weight[3, 5] += 1
    with pytest.raises(Unsupported, match=r"'a': model.embed_tokens is not in the model as the adapter has it"):
        attach(other, case.bundle)

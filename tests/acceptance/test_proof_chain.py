"""Proof 3: adapters from the wild go through compress, verify and export, or are refused in one line each."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from acceptance.real_data import Say
from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config

from lorazip_cli.main import main
from lorazip_core.adapter.collection import open_collection
from lorazip_core.adapter.reader import open_adapter

pytestmark = pytest.mark.acceptance

ODD = 23

# What each of odd/ comes to: the exit code without and with --allow-pickle.
PICKLED, UNUSABLE, WORKS = (3, 0), (3, 3), (0, 0)
EXPECTED = {
    "bert_base_bin_r8": PICKLED,
    "bloom560m_mergedlinear_enable_lora_bin": UNUSABLE,
    "distilbert_r4": WORKS,
    "gpt2_targets_not_in_model": WORKS,
    "gpt2_zeroB_r8": WORKS,
    "lerobot_smolvla_lora_bin_notpeft": UNUSABLE,
    "lfs_pointer_bge": UNUSABLE,
    "peft_finegates_roberta": UNUSABLE,
    "peft_mt0large_ia3_bin": UNUSABLE,
    "peft_regr_adalora_mlp_bin": UNUSABLE,
    "peft_regr_ia3_conv2d_bin": UNUSABLE,
    "peft_regr_ia3_mlp_bin": UNUSABLE,
    "peft_regr_ia3_opt350m_bin": UNUSABLE,
    "peft_regr_lora_conv2d_bin": PICKLED,
    "peft_regr_lora_emb_conv1d_bin": PICKLED,
    "peft_regr_lora_mlp_bin": UNUSABLE,
    "peft_regr_lora_mlp_modules_to_save_bin": PICKLED,
    "peft_regr_lora_opt125m_bnb4bit_bin": PICKLED,
    "peft_regr_lora_opt350m_bin": PICKLED,
    "peft_unilora_roberta": UNUSABLE,
    "privacyfilter_moe_tokencls_r16": WORKS,
    "roberta_bias_all_r4": WORKS,
    "sd_unet_peft_r4": WORKS,
}

METHODS = [("joint",), ("diag",), ("svd",), ("joint", "--clusters", "2"), ("joint", "--max-error", "0.1")]


class Chain:
    """The three commands on one collection; ``code`` and ``line`` are of the last that ran."""

    def __init__(self, root: Path, out: Path, capsys: pytest.CaptureFixture[str], *options: str) -> None:
        self.bundle, self.adapters = out / "bundle", out / "adapters"
        pickle = ["--allow-pickle"] if "--allow-pickle" in options else []
        self.report: dict = {}
        for verb, *argv in (
            ("compress", str(root), "-o", str(self.bundle), *options),
            ("verify", str(self.bundle), "--against", str(root), *pickle),
            ("export", str(self.bundle), "-o", str(self.adapters)),
        ):
            self.verb, self.code = verb, main([verb, *argv, "-q", "--json"])
            out_text, err_text = capsys.readouterr()
            self.lines = err_text.splitlines()
            if self.code:
                return
            if verb == "verify":
                self.report = json.loads(out_text)


def reread(original: Path, exported: Path, squared_error: float, **options: bool) -> None:
    """An exported adapter is readable, has the original's modules and extras, and is as far from it as measured.

    The export rounds once more, B = U Σ to bf16, which moves ΔŴ by at most its unit roundoff of 2⁻⁸ of its norm.
    """
    before, after = open_adapter("before", original, **options), open_adapter("after", exported)
    assert after.parts.keys() == before.parts.keys()
    assert after.extras.keys() == before.extras.keys()
    for key in before.extras:
        assert torch.equal(after.extra(key), before.extra(key)), key
    lost = total = 0.0
    for module in before.parts:
        (b, a), (b_after, a_after) = (each.factors(module, torch.float64) for each in (before, after))
        lost += float((b @ a - b_after @ a_after).square().sum())
        total += float((b @ a).square().sum())
    assert math.sqrt(lost) <= (math.sqrt(squared_error) + 2**-8) * math.sqrt(total)


@pytest.mark.parametrize("method", METHODS, ids=" ".join)
@pytest.mark.parametrize("name", ["gpt2-wild-r8", "convnext-wild-r8"])
def test_wild_adapters_go_through_the_chain(
    name: str, method: tuple[str, ...], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], say: Say
) -> None:
    chain = Chain(data / name, tmp_path, capsys, "--method", *method)
    assert (chain.verb, chain.code, chain.lines) == ("export", 0, [])
    summary = chain.report["summary"]
    errors = {adapter["name"]: adapter["squared_error"] for adapter in chain.report["adapters"]}
    say(
        f"{name:16} {' '.join(method):21} {summary['adapters']} adapters, {summary['bytes_original'] / 1e6:.1f} MB to"
        f" {summary['bytes_bundle'] / 1e6:.1f} MB; squared error: mean {summary['mean_squared_error']:.4f}, worst"
        f" {summary['max_squared_error']:.4f}"
    )
    for adapter in open_collection(data / name).adapters:
        reread(adapter.folder, chain.adapters / adapter.name, errors[adapter.name])
    if name == "gpt2-wild-r8":
        for adapter in errors:
            load_in_peft(chain.adapters / adapter)


def load_in_peft(folder: Path) -> None:
    """PEFT puts every tensor of the adapter somewhere and leaves no LoRA weight of the model without one."""
    config = PeftConfig.from_pretrained(folder)
    classifier = config.task_type == "SEQ_CLS"
    weights = load_peft_weights(str(folder))
    heads = {key: tensor.shape[0] for key, tensor in weights.items() if key.endswith("score.weight")}
    shape = GPT2Config(num_labels=next(iter(heads.values()), 2), pad_token_id=0)
    with torch.device("meta"):
        kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        model = kind.from_config(shape)
    model = get_peft_model(model.to_empty(device="cpu"), config)
    result = set_peft_model_state_dict(model, weights)
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key] == []


@pytest.fixture(scope="module")
def odd(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of odd/ alone in a collection of its own."""
    root = tmp_path_factory.mktemp("odd")
    for folder in (data / "odd").iterdir():
        shutil.copytree(folder, root / folder.name / folder.name)
    return root


def test_odd_adapters_work_or_are_refused_in_one_line(
    odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], say: Say
) -> None:
    names = sorted(folder.name for folder in odd.iterdir())
    assert len(names) == ODD
    found = {}
    for name in names:
        codes = []
        for option in ([], ["--allow-pickle"]):
            out = tmp_path / f"{name}{len(option)}"
            chain = Chain(odd / name, out, capsys, *option)
            codes.append(chain.code)
            if chain.code == 0:
                assert chain.lines == []
                error = chain.report["adapters"][0]["squared_error"]
                reread(odd / name / name, chain.adapters / name, error, allow_pickle=bool(option))
                line = f"works, squared error {error:.1e}"
            else:
                assert chain.verb == "compress"
                assert not out.exists() or not any(out.iterdir())
                about = [text for text in chain.lines if name in text]
                assert len(about) == 1
                line = about[0].replace(str(odd / name), "DIR").removeprefix("lorazip: error: ")
            if len(codes) == 1 or codes[0] != codes[1]:
                say(f"{name if len(codes) == 1 else '  ' + ' '.join(option):38} | {chain.code} | {line}")
        found[name] = tuple(codes)
    assert found == EXPECTED

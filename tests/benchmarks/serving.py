"""Throughput of vLLM with a bundle, beside the base model and vLLM's own LoRA.

    python tests/benchmarks/serving.py make OUT --adapters 1024 --shape mistral-7b
    python tests/benchmarks/serving.py run --dummy mistral-7b --adapters OUT/adapters --bundles OUT/joint OUT/coded

`make` makes up adapters and compresses them, `run` measures rows, each in an engine and a process of its own:

    base         no LoRA
    one          one ordinary LoRA, the same for all requests
    bundle       each of --bundles with lorazip's plugin, a random adapter for each request
    stock-bytes  ordinary LoRA, a random adapter for each request, in as many slots as each of --bundles takes in bytes
    stock-seqs   the same, in as many slots as sequences run at once

vLLM's own LoRA is restricted to the modules that the adapters have, and all adapters are in the main memory before
anything is measured. All requests arrive at once; prompts are random tokens, and the cache of prefixes is off.
With --add BUNDLE adapters that only this one has come and go while requests run, after the loads, so often as --changes
says. `repeat BUNDLE OUT --adapters N` makes a bundle of ever so many adapters.

A row that fails is reported, and the next one is measured. With --json every row is in the file as soon as it is
measured, and rows that an earlier run with the same settings has left there are in the table, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROWS = ("base", "one", "bundle", "stock-bytes", "stock-seqs")
ENGINE = HERE / "serving_engine.py"

_LLAMA = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-05,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mistral-7b": {
        **_LLAMA,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
    },
    "tiny": {
        **_LLAMA,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
    },
}
"""Base models without weights (`--dummy`): vLLM makes them up."""


class Shape(NamedTuple):
    """What `make` makes for a base model: words for `scale.py make`, and for `lorazip compress` of a shared basis."""

    adapters: tuple[str, ...]
    joint: tuple[str, ...]


SHAPES = {
    "mistral-7b": Shape(("--shape", "mistral-7b"), ("--clusters", "25", "--rank", "16")),
    "tiny": Shape(
        ("--shape", "tiny", "--d-model", "256", "--layers", "4", "--groups", "3"), ("--clusters", "3", "--rank", "8")
    ),
}


class Stock(NamedTuple):
    """Ordinary adapters: names and folders, the rank that vLLM needs for them, and the names of their modules."""

    adapters: list[tuple[str, str]]
    rank: int
    modules: list[str]


class Row(NamedTuple):
    """An engine to measure: its name, arguments of `vllm.LLM` besides those of all, and the adapters of requests."""

    name: str
    engine: dict[str, Any]
    adapters: list[tuple[str, str]]
    preload: bool = False
    to_add: Sequence[tuple[str, str]] = ()


def make(options: argparse.Namespace) -> int:
    """Write OUT/adapters, and the bundles OUT/joint and OUT/coded of them."""
    shape, out = SHAPES[options.shape], options.out
    out.mkdir(parents=True, exist_ok=True)
    words = ["--adapters", options.adapters, *shape.adapters, "--device", options.device]
    _say(_run(sys.executable, HERE / "scale.py", "make", out / "adapters", *words))
    some = next((out / "adapters").iterdir()) / "adapter_model.safetensors"
    budget = round(some.stat().st_size / options.times)
    coded = ("--method", "coded", "--budget-per-adapter", budget, "--objective", "resident")
    for name, more in (("coded", coded), ("joint", ("--method", "joint", *shape.joint))):
        _run(*LORAZIP, "compress", out / "adapters", "-o", out / name, *more, "--device", options.device, "-q")
        held = _info(out / name)
        _say(f"{name}: {held['bytes_bundle'] / 1e6:,.1f} MB, {_error(held):.4f} lost on average")
    return 0


def repeat(options: argparse.Namespace) -> int:
    """Write OUT, a bundle with the adapters of BUNDLE again and again."""
    from repeated_bundle import repeat

    from lorazip_core.bundle.reader import Bundle

    manifest = repeat(Bundle(options.bundle), options.out, options.adapters)
    _say(f"{len(manifest.adapters):,} adapters")
    return 0


def run(options: argparse.Namespace) -> int:
    """Measure the rows; exit code 1 if one of them failed."""
    settings = {
        "model": options.model or f"dummy {options.dummy}",
        "loads": options.loads,
        **{name: getattr(options, name) for name in ("requests", "warm_up", "rounds", "seed", "max_num_seqs")},
        **{name: getattr(options, name) for name in ("max_num_batched_tokens", "gpu_memory_utilization", "engine")},
        **({"add": str(options.add), "changes": options.changes} if options.add else {}),
    }
    done = _earlier(options.json, settings)
    failed = False
    with tempfile.TemporaryDirectory(prefix="serving-") as place:
        logs = options.logs or Path(place)
        logs.mkdir(parents=True, exist_ok=True)
        for row in rows(options):
            measured, failure = measure(row, options, Path(place), logs)
            for each in measured:
                done = [*(other for other in done if _key(other) != _key(each)), each]
                _say(_line(each, done))
            if options.json is not None:
                options.json.write_text(json.dumps({"settings": settings, "rows": done}, indent=1) + "\n")
            if failure:
                failed = True
                _say(f"{row.name}: FAILED: {failure}")
    print(table(done))
    return int(failed)


def rows(options: argparse.Namespace) -> list[Row]:
    """The rows that are asked for, in the order in which they are named."""
    found: list[Row] = []
    wanted = options.rows
    how = ("--serving",) if "stock-bytes" in wanted else ()  # which reads the bundle
    bundles = {path: _info(path, *how) for path in options.bundles} if {"bundle", "stock-bytes"} & set(wanted) else {}
    stock = read_stock(options.adapters) if options.adapters else None
    for kind in wanted:
        if kind in ("one", "stock-bytes", "stock-seqs") and stock is None:
            raise SystemExit(f"{kind} needs --adapters")
        if kind in ("bundle", "stock-bytes") and not bundles:
            raise SystemExit(f"{kind} needs --bundles")
        if kind == "base":
            found.append(Row("base", {}, []))
        elif kind == "bundle":
            found += [_bundle_row(path, held, options.max_num_seqs, options.add) for path, held in bundles.items()]
        elif stock is not None and kind == "one":
            found.append(_stock_row("one", stock._replace(adapters=stock.adapters[:1]), 1))
        elif stock is not None and kind == "stock-seqs":
            found.append(_stock_row(f"stock, {options.max_num_seqs} slots", stock, options.max_num_seqs))
        elif stock is not None:
            for path, held in bundles.items():
                slots = min(max(held["serving"]["slots"]["in_bytes_of_bundle"], 1), options.max_num_seqs)
                found.append(_stock_row(f"stock, {slots} slots as {path.name}", stock, slots))
    return found


def measure(row: Row, options: argparse.Namespace, work: Path, logs: Path) -> tuple[list[dict[str, Any]], str | None]:
    """What one engine gave, a row for each load and round, and why it did not give all of it."""
    name = re.sub(r"[^a-z0-9]+", "-", row.name.lower())
    results, spec, log = work / f"{name}.results", work / f"{name}.json", logs / f"{name}.log"
    longest = max(load["prompt"] + load["new"] for load in options.loads)
    engine = {
        "model": options.model or str(_write_config(work, options.dummy)),
        "skip_tokenizer_init": True,
        "max_model_len": longest + 1,
        "max_num_seqs": options.max_num_seqs,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "enable_prefix_caching": False,
        **({"max_num_batched_tokens": options.max_num_batched_tokens} if options.max_num_batched_tokens else {}),
        **({} if options.model else {"load_format": "dummy"}),
        **options.engine,
        **row.engine,
    }
    shared = {name: getattr(options, name) for name in ("loads", "requests", "warm_up", "rounds", "seed")}
    what = {"engine": engine, "adapters": row.adapters, "preload": row.preload, "results": str(results), **shared}
    what |= {"to_add": row.to_add, "changes": options.changes if row.to_add else 0}
    spec.write_text(json.dumps(what))
    failure = _engine(spec, log, options.timeout)
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    about: dict[str, Any] = {"row": row.name}
    measured: list[dict[str, Any]] = []
    for line in lines:
        if "load" in line:
            measured.append(line)
        else:
            about |= line
    if changed := about.pop("changed", None):
        _say(f"{row.name}: {json.dumps(changed)}")
        about["changed"] = changed
    return [{**about, **line} for line in _medians(measured)], failure


def table(done: Sequence[dict[str, Any]]) -> str:
    """All rows, load by load."""
    lines = [
        "| load | row | requests/s | of base | tokens/s | first token p50, p99 | tokens of cache | start |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for load in dict.fromkeys(each["load"] for each in done):
        for each in done:
            if each["load"] == load:
                cells = (
                    load,
                    each["row"],
                    f"{each['requests_per_second']:.1f}",
                    _of_base(each, done),
                    f"{each['tokens_per_second']:,.0f}",
                    f"{1000 * each['first_token_p50']:,.0f}, {1000 * each['first_token_p99']:,.0f} ms",
                    f"{each['cache_tokens']:,}",
                    f"{each['start_seconds']:.0f} s",
                )
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read_stock(folder: Path) -> Stock:
    """All ordinary adapters in a directory."""
    from lorazip_core.export.vllm import max_lora_rank

    configs = {path.parent: json.loads(path.read_text()) for path in sorted(folder.rglob("adapter_config.json"))}
    if not configs:
        raise SystemExit(f"no adapters in {folder}")
    modules = {module.rpartition(".")[2] for config in configs.values() for module in config["target_modules"]}
    adapters = [(path.relative_to(folder).as_posix(), str(path.resolve())) for path in configs]
    return Stock(adapters, max_lora_rank([config["r"] for config in configs.values()]), sorted(modules))


LORAZIP = (sys.executable, "-m", "lorazip_cli")


def _bundle_row(path: Path, held: dict[str, Any], sequences: int, add: Path | None) -> Row:
    from lorazip_core.bundle.reader import Bundle
    from lorazip_core.vllm.source import KEY

    names = [adapter["name"] for adapter in held["adapters"]]
    more = [adapter.name for adapter in Bundle(add).manifest.adapters] if add else []
    to_add = [(name, str(add.resolve())) for name in more if add and name not in set(names)]
    if add and not to_add:
        raise SystemExit(f"{add} has no adapter that {path} has not")
    settings = {"bundle": str(path.resolve()), "manifest_sha256": Bundle(path).digest, "spare": 4 * len(to_add)}
    engine = {
        "enable_lora": True,
        "max_loras": min(len(names), sequences),
        "max_lora_rank": 1,
        "additional_config": {KEY: settings},
    }
    return Row(f"bundle {path.name}", engine, [(name, f"{KEY}:{name}") for name in names], to_add=to_add)


def _stock_row(name: str, stock: Stock, slots: int) -> Row:
    engine = {
        "enable_lora": True,
        "max_loras": slots,
        "max_cpu_loras": max(len(stock.adapters), slots),
        "max_lora_rank": stock.rank,
        "lora_target_modules": stock.modules,
    }
    return Row(name, engine, stock.adapters, preload=True)


def _engine(spec: Path, log: Path, timeout: float) -> str | None:
    """Run an engine to its end; why it failed, or None. Nothing that it started outlives it."""
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    with open(log, "wb") as output:
        words = [sys.executable, str(ENGINE), str(spec)]
        process = subprocess.Popen(words, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            code: int | str = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = f"more than {timeout:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code == 0:
        return None
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if re.search(r"\b\w*Error\b", line)]
    return f"{code}: {said[-1][-300:] if said else 'see its log'} ({log})"


def _medians(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the rounds of each load, the one of median speed."""
    found = []
    for load in dict.fromkeys(line["load"] for line in measured):
        ordered = sorted((line for line in measured if line["load"] == load), key=lambda line: float(line["seconds"]))
        found.append(ordered[len(ordered) // 2])
    return found


def _earlier(path: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    before = json.loads(path.read_text())
    if before["settings"] != json.loads(json.dumps(settings)):
        raise SystemExit(f"{path} has rows with other settings: name another file")
    kept: list[dict[str, Any]] = before["rows"]
    return kept


def _key(measured: dict[str, Any]) -> tuple[str, str]:
    return measured["row"], measured["load"]


def _of_base(each: dict[str, Any], done: Sequence[dict[str, Any]]) -> str:
    base = [other for other in done if _key(other) == ("base", each["load"])]
    return f"{100 * each['requests_per_second'] / base[0]['requests_per_second']:.0f}%" if base else "-"


def _line(each: dict[str, Any], done: Sequence[dict[str, Any]]) -> str:
    return (
        f"{each['row']}, {each['load']}: {each['requests_per_second']:.1f} requests/s, {_of_base(each, done)} of base,"
        f" engine started in {each['start_seconds']:.0f} s"
    )


def _write_config(work: Path, name: str) -> Path:
    folder = work / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return folder


def _info(bundle: Path, *how: str) -> dict[str, Any]:
    """``info`` of a bundle, in another process: one that has used PyTorch should not start an engine."""
    found: dict[str, Any] = json.loads(_run(*LORAZIP, "info", bundle, *how, "--json"))
    return found


def _error(held: dict[str, Any]) -> float:
    return sum(adapter["squared_error"] for adapter in held["adapters"]) / len(held["adapters"])


def _run(*words: object) -> str:
    done = subprocess.run(list(map(str, words)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words[:5]))} … failed with {done.returncode}")
    return done.stdout


def _say(text: str) -> None:
    print(text.rstrip(), file=sys.stderr, flush=True)


def _load(text: str) -> dict[str, Any]:
    found = re.fullmatch(r"(\d+)\+(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not PROMPT+NEW, like 160+10")
    return {"name": text, "prompt": int(found[1]), "new": int(found[2])}


def _loads(text: str) -> list[dict[str, Any]]:
    return list(map(_load, text.split(",")))


def _kinds(text: str) -> list[str]:
    kinds = text.split(",")
    if unknown := set(kinds) - set(ROWS):
        raise argparse.ArgumentTypeError(f"no row {sorted(unknown)[0]!r}: {', '.join(ROWS)}")
    return kinds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="make|repeat|run")

    verb = verbs.add_parser("make", help="make up adapters, and compress them with both kinds of schemes")
    verb.add_argument("out", type=Path, metavar="OUT")
    verb.add_argument("--adapters", type=int, default=1024, metavar="N")
    verb.add_argument("--shape", choices=sorted(SHAPES), default="mistral-7b")
    verb.add_argument("--times", type=float, default=40, help="how many times smaller OUT/coded is on a device")
    verb.add_argument("--device", default="auto")
    verb.set_defaults(do=make)

    verb = verbs.add_parser("repeat", help="make a bundle of more adapters, which are the same ones under other names")
    verb.add_argument("bundle", type=Path, metavar="BUNDLE")
    verb.add_argument("out", type=Path, metavar="OUT")
    verb.add_argument("--adapters", type=int, default=10_000, metavar="N", help="the least number")
    verb.set_defaults(do=repeat)

    verb = verbs.add_parser("run", help="measure rows, each in an engine of its own")
    base = verb.add_mutually_exclusive_group(required=True)
    base.add_argument("--model", help="a base model with its weights, as vLLM takes it")
    base.add_argument("--dummy", choices=sorted(CONFIGS), help="a base model without weights")
    verb.add_argument("--adapters", type=Path, metavar="DIR", help="ordinary adapters, for one and stock")
    verb.add_argument("--bundles", type=Path, nargs="*", default=[], metavar="BUNDLE")
    verb.add_argument("--rows", type=_kinds, default=list(ROWS), metavar="ROW,ROW,…")
    verb.add_argument("--loads", type=_loads, default=_loads("160+10,160+128"), metavar="PROMPT+NEW,…")
    verb.add_argument("--requests", type=int, default=1024)
    verb.add_argument("--warm-up", type=int, default=256, metavar="N", help="requests before each load is measured")
    verb.add_argument("--rounds", type=int, default=1, help="of each load; that of median speed counts")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--max-num-seqs", type=int, default=256, metavar="N", help="sequences that run at once")
    verb.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="default: vLLM's")
    verb.add_argument("--gpu-memory-utilization", type=float, default=0.9, metavar="SHARE")
    verb.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="further arguments of vllm.LLM")
    verb.add_argument("--add", type=Path, metavar="BUNDLE", help="whose adapters come and go while requests run")
    verb.add_argument("--changes", type=int, default=1000, metavar="N", help="how often one of them does")
    verb.add_argument("--timeout", type=float, default=900, metavar="S", help="for one engine")
    verb.add_argument("--json", type=Path, help="keep what is measured here")
    verb.add_argument("--logs", type=Path, metavar="DIR", help="keep what engines say here")
    verb.set_defaults(do=run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    code: int = options.do(options)
    return code


if __name__ == "__main__":
    sys.exit(main())

"""What bundles of one collection keep of the exact match of its adapters, by size: python tests/benchmarks/kept.py -h

As ``verify --model`` for every bundle, but the originals answer once for all of them. For each bundle: bytes of the
originals over those of the bundle, squared errors, the exact match kept with 95% of a paired bootstrap over rows, the
divergence of answers, and by how many rows the worst adapter is down. ``--tsv`` has one line for each, and ``--svg``
draws what such tables have: of bundles called NAME-… one line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import loglog
import numpy
import torch

from lorazip_core.adapter.collection import open_collection
from lorazip_core.adapter.reader import Adapter
from lorazip_core.bundle.decoder import decode
from lorazip_core.bundle.reader import Bundle
from lorazip_core.model.base_model import BaseModel, load_base_model
from lorazip_core.model.batches import batches
from lorazip_core.model.bootstrap import SAMPLES, interval, resampled
from lorazip_core.model.hooks import Updates, applied
from lorazip_core.model.prompts import DEFAULT, Example, Prompts
from lorazip_core.model.rows import read_rows


class Kept(NamedTuple):
    """What one bundle keeps."""

    bundle: str
    times_smaller: float
    mean_squared_error: float
    max_squared_error: float
    kept: float
    low: float
    high: float
    mean_kl: float
    max_kl: float
    most_rows_down: int
    """Of an adapter: how many rows fewer it answers exactly."""

    def line(self) -> str:
        return "\t".join(f"{each:.5g}" if isinstance(each, float) else str(each) for each in self)

    @classmethod
    def of(cls, line: str) -> Kept:
        bundle, *figures, rows = line.split("\t")
        return cls(bundle, *map(float, figures), int(rows))


def answers(
    base: BaseModel, examples: Sequence[Example], some: Sequence[Updates]
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """For each of the updates, which examples are answered exactly [k, n], and Σ KL from the first of them [k, n]."""
    exact, divergence = numpy.zeros((len(some), len(examples)), bool), numpy.zeros((len(some), len(examples)))
    with torch.inference_mode():
        for batch in batches(examples, base.vocabulary, base.device):
            first: list[torch.Tensor] = []
            for number, updates in enumerate(some):
                with applied(base.model, updates):
                    logits = base.logits(batch.ids, batch.mask, batch.wanted)
                said = [row[where].double().log_softmax(-1) for row, where in zip(logits, batch.answers, strict=True)]
                first = first or said
                for place, p, q, target in zip(batch.places, first, said, batch.targets, strict=True):
                    exact[number, place] = bool((q.argmax(-1) == target).all())
                    divergence[number, place] = float((p.exp() * (p - q)).sum())
    return exact, divergence


def kept_by(base: BaseModel, originals: Path, rows: Path, bundles: Sequence[Bundle], adapters: set[str]) -> list[Kept]:
    """What each of the bundles keeps, over those of ``adapters`` (all, if empty) that have rows."""
    every, prompts = read_rows(rows), Prompts(base.tokenizer, DEFAULT)
    samples = numpy.zeros((len(bundles), 2, SAMPLES))
    matches: list[numpy.ndarray] = []
    divergences: list[numpy.ndarray] = []
    for adapter in open_collection(originals).adapters:
        if not every.of(adapter.name) or (adapters and adapter.name not in adapters):
            continue
        examples = [prompts.example(row) for row in every.of(adapter.name)]
        updates = [_original(adapter), *(_compressed(bundle, adapter.name) for bundle in bundles)]
        exact, divergence = answers(base, examples, updates)
        for number in range(len(bundles)):
            samples[number] += resampled(adapter.name, exact[0], exact[number + 1])
        matches.append(exact.sum(1))
        divergences.append(divergence.sum(1) / sum(example.answer for example in examples))
        print(f"{adapter.name}: exact {exact.sum(1).tolist()} of {len(examples)}", file=sys.stderr, flush=True)
    right, kl = numpy.array(matches), numpy.array(divergences)
    size = sum(adapter.size_bytes for adapter in open_collection(originals).adapters)
    found = []
    for number, bundle in enumerate(bundles):
        errors = [entry.squared_error for entry in bundle.manifest.adapters]
        low, high = interval(samples[number]) or (0.0, 0.0)
        own, down = kl[:, number + 1], right[:, 0] - right[:, number + 1]
        bytes_bundle = bundle.size_bytes
        found.append(
            Kept(
                bundle.path.name,
                size / bytes_bundle,
                float(numpy.mean(errors)),
                max(errors),
                float(right[:, number + 1].sum() / right[:, 0].sum()),
                low,
                high,
                float(own.mean()),
                float(own.max()),
                int(down.max()),
            )
        )
    return found


def _original(adapter: Adapter) -> Updates:
    return {name: adapter.factors(name) for name in adapter.parts}


def _compressed(bundle: Bundle, name: str) -> Updates:
    entry = next(entry for entry in bundle.manifest.adapters if entry.name == name)
    return {module.name: decode(bundle, entry, module) for module in bundle.modules(entry)}


def picture(found: Sequence[Kept]) -> str:
    """The exact match that is lost over the squared error; what is not lost lies on the axis."""
    kinds = sorted({each.bundle.rpartition("-")[0] for each in found})
    lines = [
        loglog.Line(kind, sorted((each.mean_squared_error, 1 - each.kept) for each in found if _is(each, kind)), True)
        for kind in kinds
    ]
    lines.append(loglog.Line("1% lost", [(0.05, 0.01), (0.7, 0.01)], bound=True))
    panel = loglog.Panel("Exact match lost over the mean squared error", lines)
    return loglog.svg([panel], "mean squared error", "share of exact match lost", (0.05, 0.7), 0.002)


def _is(kept: Kept, kind: str) -> bool:
    return kept.bundle.rpartition("-")[0] == kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", help="bundles; with --svg, tables of an earlier --tsv")
    parser.add_argument("--against", type=Path, help="the original adapters")
    parser.add_argument("--model", help="the base model")
    parser.add_argument("--rows", type=Path, help="a folder of NAME.jsonl, a file for each adapter")
    parser.add_argument("--only", type=Path, help="only adapters that this folder has, too")
    parser.add_argument("--tsv", type=Path, help="write the table here, also")
    parser.add_argument("--svg", type=Path, help="draw tables, and measure nothing")
    options = parser.parse_args()
    if options.svg:
        lines = [line for path in options.bundles for line in path.read_text().splitlines()[1:]]
        options.svg.write_text(picture([Kept.of(line) for line in lines]))
        return
    if not (options.against and options.model and options.rows):
        parser.error("--against, --model and --rows are needed")
    only = {path.name for path in options.only.iterdir()} if options.only else set()
    bundles = [Bundle(path) for path in options.bundles]
    base = load_base_model(options.model, torch.device("cpu"), "f32")
    lines = [
        "\t".join(Kept._fields),
        *(each.line() for each in kept_by(base, options.against, options.rows, bundles, only)),
    ]
    print("\n".join(lines))
    if options.tsv:
        options.tsv.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

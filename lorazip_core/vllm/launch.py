"""The command that has vLLM serve a bundle: its own OpenAI server, with what lorazip's plugin in it needs."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..base.errors import UsageError
from ..bundle.contradictions import refuse_contradictions
from ..bundle.manifest import Manifest
from ..bundle.reader import Bundle
from ..export.vllm import RANKS
from . import versions
from .address import Address
from .options import ADDITIONAL, Ours, understand
from .servable import check_adapters, names_taken
from .source import KEY

SERVER = ("-m", "vllm.entrypoints.openai.api_server")
"""`vllm serve` is the same server; of the CPU package it does not start, as it looks for metadata of another name."""
_MOST_SEQUENCES = 1024  # the largest default of --max-num-seqs that vLLM has for any device
_PLUGINS = "VLLM_PLUGINS"
_CONFIG = "config.json"


class Launch(NamedTuple):
    """A process to start: its words, what it needs in the environment besides what is there, and notes for people."""

    command: list[str]
    environment: dict[str, str]
    notes: list[str]
    address: Address | None
    """Where it will listen; None at a socket in the file system."""

    def text(self) -> str:
        """The command as a shell takes it, variables first."""
        return " ".join(
            [*(f"{name}={shlex.quote(value)}" for name, value in self.environment.items()), shlex.join(self.command)]
        )


def plan(
    path: Path,
    model: str,
    *,
    host: str | None = None,
    port: int | None = None,
    spare: int = 0,
    more: Sequence[str] = (),
    version: str,
    environment: Mapping[str, str],
) -> Launch:
    """How vLLM ``version`` is started to serve the bundle at ``path`` on a base model, by its name or its directory.

    ``spare`` adapters can be added while it runs. ``more`` are options of vLLM. ``environment`` is that of the process
    which starts it.

    Raises UsageError for options that contradict lorazip's and for a model in a directory whose weights have other
    shapes, LocalError for another vLLM, Unsupported for adapters that it cannot serve, BundleDamaged for a file that is
    not there or not as long as it was, and as opening a bundle does.
    """
    versions.check(version)
    bundle = Bundle(path)
    refuse_contradictions(path, bundle.manifest)
    settings = {"bundle": str(path.resolve()), "manifest_sha256": bundle.digest, "spare": spare}
    given = understand(more, Ours(model, settings, host, port))
    check_adapters(bundle)
    bundle.check_sizes(file.path for file in bundle.manifest.files)
    names = {adapter.name for adapter in bundle.manifest.adapters}
    if taken := names_taken(given.served_model_names or [model], names):
        raise UsageError(taken, "give the base model another --served-model-name")
    notes = _check_model(bundle.manifest, model)
    words = [sys.executable, *SERVER, "--model", model]
    for name, value in (("host", host), ("port", port)):
        words += [] if value is None else [f"--{name}", str(value)]
    words += ["--enable-lora"]
    if given.max_loras is None:
        # The scheduler lets a batch have no more different adapters than this. Resident ones take no memory for it.
        most = _batch(len(bundle.manifest.adapters) + spare, given.max_num_seqs)
        words += ["--max-loras", str(most)]
    if given.max_lora_rank is None:
        words += ["--max-lora-rank", str(RANKS[0])]
    words += [ADDITIONAL, json.dumps(given.additional_config | {KEY: settings})]
    address = Address(given.host if host is None else host, given.port if port is None else str(port))
    return Launch([*words, *given.words], _variables(environment), notes, None if given.uds else address)


def _batch(adapters: int, sequences: str | None) -> int:
    """How many different adapters a batch may have: no more than sequences, no more than there are."""
    return min(adapters, int(sequences) if sequences and sequences.isdecimal() and int(sequences) else _MOST_SEQUENCES)


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What the plugin needs in the environment. vLLM loads all plugins, unless it is told which."""
    chosen = environment.get(_PLUGINS)
    plugins = {} if chosen is None else {_PLUGINS: ",".join(filter(None, dict.fromkeys([*chosen.split(","), KEY])))}
    return {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} | plugins


def _check_model(manifest: Manifest, model: str) -> list[str]:
    """A note if it is not known whether the model is the bundle's. Raises UsageError if it is none, or another one."""
    path = Path(model)
    if not path.is_dir():
        if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise UsageError(f"{model} is no directory of a model, and no name on the Hub", "name another «model»")
        if manifest.base_model is None or manifest.base_model.casefold() == model.casefold():
            return []
        return [f"the adapters are of {manifest.base_model}; whether {model} is the same model is not known"]
    if not (path / _CONFIG).is_file():
        raise UsageError(f"{model} is no model: it has no {_CONFIG}", "name another «model»")
    from .base_weights import mismatch, read_weights  # loads PyTorch, which takes seconds

    weights = read_weights(path)
    if found := mismatch(weights, manifest.modules):
        raise UsageError(f"{model} is not the base model of these adapters: {found}", "name another «model»")
    if not any(f"{module.name}.weight" in weights for module in manifest.modules):
        why = "it has no safetensors files" if not weights else "it has other names"
        return [f"whether {model} is the base model of these adapters is not known: {why}"]
    return []

"""What the tests of `fetch` share: adapters to serve, and the command against a Hub on loopback."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from lorazip_cli.main import main
from lorazip_core.adapter.lock import Lock, read_lock
from testing.hub import HubServer, Repository

BASE = "org/base"
CARD = {"library_name": "peft", "base_model": BASE, "license": "mit"}


def adapter_files(seed: int = 0, *, base: str = BASE, readme: bool = True, **config: Any) -> dict[str, bytes]:
    """A tiny adapter of PEFT's form; other seeds, other weights."""
    generator = np.random.default_rng(seed)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    weights = {
        f"{prefix}A.weight": generator.normal(size=(2, 8)).astype(np.float32),
        f"{prefix}B.weight": generator.normal(size=(6, 2)).astype(np.float32),
    }
    fields = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 2, "lora_alpha": 4} | config
    files = {
        "adapter_config.json": json.dumps(fields).encode(),
        "adapter_model.safetensors": save(weights, metadata={"format": "pt"}),
        "optimizer.pt": b"not needed",
        "tokenizer.json": b"{}",
    }
    return files | ({"README.md": b"---\nlicense: mit\n---\nA card.\n"} if readme else {})


NEEDED = ("README.md", "adapter_config.json", "adapter_model.safetensors")


def repository(id: str, seed: int = 0, **settings: Any) -> Repository:
    return Repository.of(id, adapter_files(seed), **{"card_data": CARD, **settings})


@dataclass
class Fetching:
    """The command, run in this process against a Hub, into a directory of the test."""

    hub: HubServer
    directory: Path
    capsys: pytest.CaptureFixture[str]
    code: int = -1
    out: str = ""
    err: str = ""

    def __call__(self, *arguments: str, output: Path | None = None) -> int:
        """Run it; the exit code, which is kept with what was printed."""
        self.capsys.readouterr()
        self.code = main(["fetch", *arguments, "-o", str(output or self.directory)])
        self.out, self.err = self.capsys.readouterr()
        return self.code

    def json(self, *arguments: str) -> dict[str, Any]:
        self(*arguments, "--json")
        return dict(json.loads(self.out))

    @property
    def errors(self) -> list[str]:
        """The error lines, without their start."""
        start = "lorazip: error: "
        return [line.removeprefix(start) for line in self.err.splitlines() if line.startswith(start)]

    @property
    def lock(self) -> Lock:
        lock = read_lock(self.directory)
        assert lock is not None
        return lock

    @property
    def names(self) -> list[str]:
        return [adapter.name for adapter in self.lock.adapters]

    def files(self) -> dict[str, bytes]:
        """All that is in the directory, the lock aside."""
        return {
            path.relative_to(self.directory).as_posix(): path.read_bytes()
            for path in sorted(self.directory.rglob("*"))
            if path.is_file() and path.name != "lorazip.lock"
        }

    def downloaded(self) -> list[str]:
        """``owner/repo/path`` of every file that was sent since the log was cleared, as often as it was."""
        return sorted(
            f"{repository}/{path}" for (repository, path), sent in self.hub.log.downloads().items() for _ in sent
        )

"""What holds a bundle has all that workers of this release of vLLM call what holds adapters for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("vllm.version", reason="needs vLLM (make test-vllm)")

from vllm.v1 import worker

from lorazip_core.vllm.manager import BundleManager


def test_every_method_that_is_called_is_there() -> None:
    [folder] = worker.__path__
    called = {
        name
        for file in Path(folder).rglob("*.py")
        for name in re.findall(r"\blora_manager\.(\w+)", file.read_text(encoding="utf-8"))
    }
    assert {"add_adapter", "remove_adapter", "set_active_adapters"} <= called
    assert called <= set(dir(BundleManager))

"""The example of an engine in docs/serving.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("vllm.version", reason="needs vLLM (make test-vllm)")

import testing.engine_example
from testing.engine import run
from testing.tiny_models import llama, save_model

from lorazip_core.compress.run import compress
from lorazip_core.planning.options import CompressOptions
from lorazip_core.sample import sample_path

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def test_it_runs(tmp_path: Path) -> None:
    """On a model of random weights that has the layers that the sample is for."""
    example, *_ = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    compress(sample_path(), tmp_path / "bundle", CompressOptions())
    save_model(tmp_path / "base", llama(18, hidden_size=576, num_attention_heads=9, num_key_value_heads=3))
    spec = {"folder": str(tmp_path), "example": example}
    tokens = run(tmp_path / "engine", Path(testing.engine_example.__file__), spec)
    assert [len(each) for each in tokens] == [4, 4]
    assert tokens[0] != tokens[1]

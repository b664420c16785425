"""Fixtures of more than one module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lorazip_core.compress.run import compress
from lorazip_core.planning.options import CompressOptions
from lorazip_core.sample import sample_path

if TYPE_CHECKING:
    from testing.living_llama import LivingLlama


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the sample. It is there to be read: who changes one makes a copy."""
    folder = tmp_path_factory.mktemp("served") / "bundle"
    compress(sample_path(), folder, CompressOptions())
    return folder


@pytest.fixture(scope="session")
def living(tmp_path_factory: pytest.TempPathFactory) -> LivingLlama:
    """Bundles that come out of each other. They are made and asked here, and no engine is: they are in processes."""
    from testing.living_llama import LivingLlama

    return LivingLlama(tmp_path_factory.mktemp("living"))

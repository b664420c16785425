"""Fixtures of more than one module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from testing.living_llama import LivingLlama


@pytest.fixture(scope="session")
def living(tmp_path_factory: pytest.TempPathFactory) -> LivingLlama:
    """Bundles that come out of each other. They are made and asked here, and no engine is: they are in processes."""
    from testing.living_llama import LivingLlama

    return LivingLlama(tmp_path_factory.mktemp("living"))

"""Where the real adapters are, and the fixtures that conftest.py makes of them, as types."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from lorazip_core.compress.run import CompressReport
from lorazip_core.planning.options import CompressOptions

SHARED = Path(__file__).parents[3] / "shared"

Say = Callable[[str], None]
Compressed = Callable[[CompressOptions], tuple[Path, CompressReport]]
Process = Callable[..., "subprocess.CompletedProcess[str]"]

"""The same bytes whatever the number of threads: of PyTorch, and of those in which adapters are compressed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorazip_core.base.digests import sha256_file
from lorazip_core.base.filesystem import tree

COMPRESS = """
import os, sys
from pathlib import Path
from lorazip_core.compress.run import compress
from lorazip_core.planning.options import CompressOptions
from lorazip_core.sample import sample_path

os.sched_getaffinity = lambda _: range(int(sys.argv[3]))  # as many workers as a machine with these cores has
compress(sample_path(), Path(sys.argv[1]), CompressOptions(budget=int(sys.argv[2]) or None))
"""


@pytest.mark.parametrize("budget", [pytest.param(0, marks=pytest.mark.slow), 150_000])
def test_threads_change_no_byte(tmp_path: Path, budget: int) -> None:
    digests = []
    for threads, workers in (("1", "1"), ("2", "1"), ("4", "5")):
        bundle = tmp_path / f"{threads}-{workers}"
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        command = [sys.executable, "-c", COMPRESS, str(bundle), str(budget), workers]
        subprocess.run(command, env=environment, check=True)
        digests.append({name: sha256_file(bundle / name) for name in tree(bundle)})
    assert all(each == digests[0] for each in digests)
    assert len(digests[0]) > 2

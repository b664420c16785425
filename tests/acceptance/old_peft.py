"""An environment with PEFT 0.13 and the Transformers of its time, which shares the torch that is here.

python old_peft.py FOLDER      makes it and prints its interpreter
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import torch

PACKAGES = (
    "peft==0.13.2",
    "transformers==4.46.3",
    "tokenizers==0.20.3",
    "huggingface_hub==0.26.5",
    "accelerate==1.1.1",
)


def make_environment(folder: Path) -> Path:
    """Make the environment in ``folder``; its interpreter. Raises CalledProcessError if a package is not to be had."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", *PACKAGES], check=True, capture_output=True)
    subprocess.run([*pip, "requests"], check=True, capture_output=True)
    # The last on the path, so that only what is not in the environment itself, such as torch, comes from there.
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "zz-shared.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python


if __name__ == "__main__":
    print(make_environment(Path(sys.argv[1])))

"""Whether models can be loaded, and what is no model at first sight. Nothing here loads torch."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from ..base.errors import LocalError, UsageError
from ..bundle.kinds import is_adapter, is_bundle

_NEEDED = ("jinja2", "transformers")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_available() -> None:
    """Raise LocalError where no model can be loaded; called before the work."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise LocalError(f"to run a model needs {' and '.join(missing)}", f"pip install {' '.join(missing)}")


def check_model(name: str) -> None:
    """Raise UsageError for what is neither a directory with a model nor a name that the Hub may know."""
    path = Path(name)
    if not path.exists():
        if _HUB_NAME.fullmatch(name) is None:
            raise UsageError(f"{name} is neither a directory nor the name of a model on the Hub")
    elif not path.is_dir():
        raise UsageError(f"{name} is a file, not the directory of a model")
    elif is_bundle(path) or is_adapter(path):
        what = "a bundle" if is_bundle(path) else "an adapter"
        raise UsageError(f"{name} is {what}, not a base model", "name the model that the adapters were trained on")
    elif not (path / "config.json").is_file():
        raise UsageError(f"{name} is not the directory of a model: it has no config.json")

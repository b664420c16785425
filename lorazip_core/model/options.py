"""What to ask which model, and what its answers have to keep. Nothing here loads torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, NamedTuple

from ..base.errors import UsageError
from .extra import check_available, check_model
from .prompts import DEFAULT
from .rows import Rows, read_rows

ModelDtype = Literal["f32", "bf16", "f16"]


class ModelOptions(NamedTuple):
    """``min_kept`` bounds what all adapters keep of their exact match, ``max_kl`` the divergence of the worst one."""

    model: str
    """A directory, or a name on the Hub."""
    rows: Path
    min_kept: float | None = None
    max_kl: float | None = None
    dtype: ModelDtype = "f32"
    prompt_tokens: int = DEFAULT
    """Tokens that a prompt may have; of a longer one the middle is left out."""
    max_rows: int | None = None
    """At most so many rows of each adapter, the first ones."""

    def read(self) -> Rows:
        """The rows, when all that can be known before the work makes sense. Raises UsageError or LocalError."""
        for parameter, limit in (("«min_kept»", self.min_kept), ("«max_kl»", self.max_kl)):
            if limit is not None and not (limit >= 0 and math.isfinite(limit)):
                raise UsageError(f"{parameter} {limit}: a limit is a number of 0 or more")
        check_available()
        check_model(self.model)
        return read_rows(self.rows).first(self.max_rows)

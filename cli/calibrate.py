"""`lorazip calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorazip_core.bundle.kinds import check_adapters_path
from lorazip_core.model.options import ModelOptions
from lorazip_core.model.prompts import DEFAULT

from . import console
from .options import (
    AllowPickle,
    Device,
    ForceFiles,
    Json,
    MaxRows,
    ModelDtype,
    PromptTokens,
    Quiet,
    check_rank,
)
from .progress import progress
from .report_file import check_report_files, write_report_files
from .table import count, megabytes
from .wording import report_in_options

if TYPE_CHECKING:
    from lorazip_core.model.calibrate import CalibrateReport


def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The base model: a directory, or a name on the Hub.")],
    rows: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON lines of input and output, or a folder of such files.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.safetensors", help="Where the moments go.")],
    adapters: Annotated[
        Path | None,
        typer.Option("--adapters", metavar="DIR", help="Only modules that these adapters target. Default: all linear."),
    ] = None,
    rank: Annotated[
        int,
        typer.Option("--rank", metavar="R", callback=check_rank, help="Directions that are kept of each input."),
    ] = 32,
    model_dtype: ModelDtype = "f32",
    prompt_tokens: PromptTokens = DEFAULT,
    max_rows: MaxRows = None,
    device: Device = "auto",
    allow_pickle: AllowPickle = False,
    force: ForceFiles = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Measure what goes into the modules of a base model.

    Runs the rows through the model and writes the second moments of each module's inputs, a few MB.
    """
    options = ModelOptions(model, rows, None, None, model_dtype, prompt_tokens, max_rows)
    options.read()
    if adapters is not None:
        check_adapters_path(adapters)
    files = {"-o": output}
    check_report_files(files, inputs=[rows, *([adapters] if adapters else [])], force=force, json=json)
    from lorazip_core.model.calibrate import calibrate as measure

    found = measure(
        options,
        output,
        adapters=adapters,
        rank=rank,
        device=device,
        allow_pickle=allow_pickle,
        progress=progress(quiet),
    )
    write_report_files(files, {"-o": lambda: found.data})
    console.show(report_in_options(found.report), _render, as_json=json, quiet=quiet)
    return 0


def _render(report: CalibrateReport) -> None:
    console.say(
        f"{report.output}: {count(report.inputs, 'input')} of {count(report.modules, 'module')},"
        f" {report.rank} directions each, {megabytes(report.size_bytes)}"
    )
    console.say(f"from {count(report.examples, 'row')}, {count(report.tokens, 'token')}")
    console.listing("left out", [f"{each.name}: {each.reason}" for each in report.left_out])

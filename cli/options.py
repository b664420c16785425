"""Options that several commands share: one name, one meaning, one help text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

import typer

from lorazip_core.base.errors import UsageError
from lorazip_core.bundle.kinds import is_bundle
from lorazip_core.model.prompts import LEAST as PROMPTS_LEAST

Dtype = Literal["bf16", "f16", "f32"]


def squared_error(value: float | None) -> float | None:
    """A limit on a squared error: a share, from 0 to 1."""
    if value is not None and not 0 <= value <= 1:
        raise typer.BadParameter(f"{value} is not between 0 (lossless) and 1 (all is lost)")
    return value


def share(value: float) -> float:
    """A part of a whole, which leaves some of it."""
    if not 0 <= value < 1:
        raise typer.BadParameter(f"{value} is not a share, of 0 or more and below 1")
    return value


def between(least: int, most: int) -> Callable[[int | None], int | None]:
    """A check that a number is neither less nor more."""

    def check(value: int | None) -> int | None:
        if value is not None and not least <= value <= most:
            bounds = f"of {least} or more" if value < least else f"of {most} or less"
            raise typer.BadParameter(f"{value} is not a number {bounds}")
        return value

    return check


def one_of(known: Callable[[], Sequence[str]]) -> Callable[[str], str]:
    """A check that a value is one of those ``known`` by then."""

    def check(value: str) -> str:
        if value not in known():
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(map(repr, known()))}")
        return value

    return check


check_rank = between(1, 65536)


def device(value: str) -> str:
    """auto, cpu, cuda or cuda:N; whether it is there shows when it is used."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise typer.BadParameter(f"{value!r} is none of auto, cpu, cuda, cuda:N")
    return value


def size(value: str) -> int:
    """8G, 1.5GB, 500 mb, 8GiB or 1000000 in bytes.

    K, M, G and T are powers of 1000, with an i behind them of 1024. Case, a blank before and a B after do not count.
    """
    found = re.fullmatch(r"([0-9]{1,15})(\.[0-9]{1,9})? ?(?:([kmgt])(i)?)?b?", value, re.IGNORECASE | re.ASCII)
    bytes_ = 0
    if found:
        whole, decimals, unit, binary = found.groups()
        power = " kmgt".index(unit.lower()) if unit else 0
        bytes_ = int(Fraction(f"{whole}{decimals or ''}") * (1024 if binary else 1000) ** power)
    if bytes_ < 1:
        raise typer.BadParameter(f"{value!r} is no size: give bytes, or K, M, G, T or Ki, Mi, Gi, Ti, like 500MB or 8G")
    return bytes_


def clusters(value: str) -> int | Literal["auto"] | Path:
    """A number of clusters, ``auto``, or the file that assigns them."""
    if value == "auto":
        return "auto"
    if re.fullmatch(r"-?[0-9]{1,9}", value):
        if int(value) < 1:
            raise typer.BadParameter(f"{value} is not 1 or more", param_hint="'--clusters'")
        return int(value)
    if is_bundle(Path(value)):
        raise UsageError(f"--clusters {value}: it is a bundle", "name the file that 'lorazip cluster' wrote")
    if not Path(value).is_file():
        raise typer.BadParameter(f"{value!r} is neither a number, nor auto, nor a file", param_hint="'--clusters'")
    return Path(value)


def require_output(output: Path | None, *, dry_run: bool) -> None:
    """Raise BadParameter if nothing says where a command is to write, and it is to write something."""
    if output is None and not dry_run:
        raise typer.BadParameter("it is needed, except with --dry-run", param_hint="'-o' / '--output'")


def not_negative(value: float | None) -> float | None:
    """A limit that has no upper bound."""
    if value is not None and not 0 <= value < float("inf"):
        raise typer.BadParameter(f"{value} is not a number of 0 or more")
    return value


Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle, as `lorazip compress` writes it.")]
NewBundle = Annotated[Path | None, typer.Option("-o", "--output", metavar="NEW", help="Where the new bundle goes.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done; write nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output of lorazip that exists.")]
ForceFiles = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
ReportPage = Annotated[
    Path | None, typer.Option("--report", metavar="FILE.html", help="Write a page with charts that opens offline.")
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but data and errors.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pickled .bin weights too (tensors only, no code).")
]
Device = Annotated[
    str, typer.Option("--device", metavar="auto|cpu|cuda[:N]", callback=device, help="Where to compute.")
]
Memory = Annotated[
    int | None,
    typer.Option("--memory", metavar="SIZE", parser=size, help="Bound on main memory, like 8GiB. Default: none."),
]
DeviceMemory = Annotated[
    int | None,
    typer.Option("--device-memory", metavar="SIZE", parser=size, help="Bound on GPU memory. Default: what is free."),
]
Seed = Annotated[
    int, typer.Option("--seed", metavar="N", callback=between(0, 2**63 - 1), help="Seed of the random starts.")
]
Weights = Annotated[
    Literal["adapter", "module"],
    typer.Option("--weights", metavar="adapter|module", help="What counts equally: adapters, or their modules."),
]
AllowMixedBase = Annotated[
    bool,
    typer.Option(
        "--allow-mixed-base", help="Accept adapters that name different base models; the bundle names the first one's."
    ),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Go on without adapters that cannot be used.")]
Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="Every folder in it with an adapter_config.json is an adapter.")
]
ModelDtype = Annotated[
    Literal["f32", "bf16", "f16"],
    typer.Option("--model-dtype", metavar="f32|bf16|f16", help="What the model computes in."),
]
PromptTokens = Annotated[
    int,
    typer.Option(
        "--prompt-tokens",
        metavar="N",
        callback=between(PROMPTS_LEAST, 2**20),
        help="Tokens that prompts keep: of longer ones the first 24 and the last.",
    ),
]
MaxRows = Annotated[
    int | None,
    typer.Option("--max-rows", metavar="N", callback=between(1, 2**40), help="Only the first N rows of each adapter."),
]
MaxMeanError = Annotated[
    float | None,
    typer.Option("--max-mean-error", metavar="E", callback=squared_error, help="Fail if the mean is above E."),
]

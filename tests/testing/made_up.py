"""Made-up reports of any size for the tests of what is rendered of them, with names that mean harm."""

from __future__ import annotations

import numpy as np

from lorazip_core.bundle.check import Finding
from lorazip_core.bundle.manifest import AdapterEntry, Manifest, ModuleError, Parameters
from lorazip_core.bundle.quality import quality_warnings
from lorazip_core.bundle.summary import summarise
from lorazip_core.clustering.clusters_file import (
    AssignedAdapter,
    Assignment,
    Candidate,
    ClusterFigures,
    NearDuplicate,
    Outlier,
)
from lorazip_core.compress.run import Compression, CompressReport, WorstAdapter
from lorazip_core.planning.frontier import Frontier, FrontierPoint
from lorazip_core.planning.plan import PlannedScheme, PlanReport
from lorazip_core.verify.run import AdapterReport, Gates, ModuleErrors, Outputs, Verification, VerifyReport

HOSTILE = [
    "</script><script>document.title='pwned'</script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    "<b>bold</b> &lt;i&gt; &amp;",
    "a\nb\r\tc\x00\x1b[31m\x7f\u2028\ufffe",
    "%{x} %{customdata[0]} <extra>no</extra> {{ 7*7 }} {% raw %}",
    "pipe|back`tick``\\|end\\ *bold* _it_ [link](http://x.example) ![i](x) @someone #1 ~s~ www.x.example :x:",
    "]]> &quot; ' \" --> <!--",
    "constructor",
    "__proto__",
    "\u202egnp.exe",
    "-",
    "  spaces  ",
    "日本語/ünïcode",
]


def made_up(
    adapters: int = 4,
    modules: int = 6,
    *,
    names: list[str] | None = None,
    measured: bool = True,
    unknown: tuple[int, ...] = (),
    max_error: float | None = None,
    max_mean_error: float | None = None,
    findings: tuple[Finding, ...] = (),
    outputs: bool = False,
) -> Verification:
    """A verification of ``adapters``, every third one kept on its own; those in ``unknown`` could not be measured.

    With ``outputs``, what these lose was measured of all but the first: half as much.
    """
    rng = np.random.default_rng(0)
    names = names or [f"team/adapter-{number:04d}" for number in range(adapters)]
    columns = [f"layers.{number // 2}.{('q_proj', 'v_proj')[number % 2]}" for number in range(modules)]
    errors = rng.uniform(0.01, 0.5, (len(names), modules))
    errors[0, 0] = np.nan  # an adapter without the module
    reports = []
    for row, name in enumerate(names):
        mean = float(np.nanmean(errors[row]))
        worst = int(np.nanargmax(errors[row]))
        known = row not in unknown
        reports.append(
            AdapterReport(
                name=name,
                scheme="svd" if row % 3 == 2 else "joint",
                cluster=None if row % 3 == 2 else row % 3,
                claimed_squared_error=mean,
                squared_error=mean if measured and known else None,
                mean_module_squared_error=mean if known else None,
                worst_module=ModuleError(columns[worst], float(errors[row, worst])) if known else None,
                output_squared_error=mean / 2 if outputs and known and row else None,
            )
        )
    of_summary = [each.squared_error if measured else each.claimed_squared_error for each in reports]
    report = VerifyReport(
        ok=not findings,
        bundle="bundle",
        against="originals" if measured else None,
        errors_are="measured" if measured else "claimed",
        gates=Gates(max_error, max_mean_error),
        adapters=reports,
        summary=summarise(len(reports), [error for error in of_summary if error is not None], 10**8, 10**7),
        findings=list(findings),
        outputs=_outputs(reports) if outputs else None,
    )
    rows = [row for row in range(len(names)) if row not in unknown]
    matrix = ModuleErrors([names[row] for row in rows], columns, errors[rows])
    return Verification(report, matrix if measured else None)


def _outputs(reports: list[AdapterReport]) -> Outputs:
    errors = {each.name: each.output_squared_error for each in reports if each.output_squared_error is not None}
    worst = max(errors, key=errors.__getitem__)
    mean = sum(errors.values()) / len(errors)
    return Outputs(
        calibration="moments.safetensors",
        adapters=len(errors),
        mean_squared_error=mean,
        max_squared_error=errors[worst],
        worst_adapter=worst,
    )


def unreadable() -> Verification:
    """Of a bundle whose manifest is damaged."""
    finding = Finding("manifest", "manifest.json", "bundle: no JSON", damage=True)
    report = VerifyReport(
        ok=False,
        bundle="bundle",
        against=None,
        errors_are="claimed",
        gates=Gates(0.1, None),
        adapters=[],
        summary=None,
        findings=[finding],
    )
    return Verification(report, None)


def assigned(
    adapters: int, clusters: int, *, names: list[str] | None = None, candidates: bool = True
) -> tuple[Assignment, np.ndarray]:
    """A clustering with everything in it, and its similarity."""
    rng = np.random.default_rng(0)
    names = names or [f"team/adapter-{number:04d}" for number in range(adapters)]
    number = len(names)
    own = [each % clusters for each in range(number)]
    similarity = rng.uniform(0.02, 0.15, (number, number))
    similarity[np.equal.outer(own, own)] += 0.3
    np.fill_diagonal(similarity, 1)
    errors = rng.uniform(0.05, 0.6, number)
    several = number > 1
    joint = [
        Candidate(
            method="joint",
            rank=16,
            clusters=k,
            bytes_bundle=10**6 * (1 + k),
            saved_ratio=1 - (1 + k) / 20,
            mean_squared_error=0.4 / k,
            max_squared_error=0.7 / k,
            cost=0.4 / k + (1 + k) / 20,
            measured_on="probes",
            chosen=k == clusters,
        )
        for k in (1, 2, 4, 8)
    ]
    svd = [
        Candidate(
            method="svd",
            rank=rank,
            clusters=0,
            bytes_bundle=10**6 * rank,
            saved_ratio=1 - rank / 20,
            mean_squared_error=0.5 / rank,
            max_squared_error=0.8 / rank,
            cost=0.5 / rank + rank / 20,
            measured_on="probes",
            chosen=False,
        )
        for rank in (1, 4)
    ]
    assignment = Assignment(
        assignment=dict(zip(names, own, strict=True)),
        base_model="org/base",
        rank=16,
        seed=0,
        adapters=[
            AssignedAdapter(
                name=name,
                cluster=own[row],
                sha256="0" * 64,
                squared_error=float(errors[row]),
                next_cluster=(own[row] + 1) % clusters if clusters > 1 else None,
                next_squared_error=0.7 if clusters > 1 else None,
                held_out_squared_error=0.8,
                nearest=names[row - 1] if several else None,
                similarity=0.4 if several else None,
            )
            for row, name in enumerate(names)
        ],
        clusters=[
            ClusterFigures(
                adapters=own.count(each),
                mean_squared_error=float(np.mean(errors[np.equal(own, each)])),
                max_squared_error=float(np.max(errors[np.equal(own, each)])),
                similarity_within=0.3 if several else None,
                similarity_to_others=0.1 if clusters > 1 else None,
            )
            for each in range(clusters)
        ],
        outliers=[Outlier(name=names[0], squared_error=0.9, held_out_squared_error=0.99, reason="loses-most")]
        if several
        else [],
        near_duplicates=[NearDuplicate(first=names[0], second=names[1], squared_distance=1e-5)] if several else [],
        candidates=joint + svd if candidates else [],
        objective=[9.0, 8.0, 7.5],
    )
    return assignment, similarity


FRONTIER = Frontier(
    points=[
        FrontierPoint("coded", 20_000_000, 0.001, 0.002, chosen=False),
        FrontierPoint("svd", 20_000_000, 0.02, 0.03, chosen=False),
        FrontierPoint("coded", 9_000_000, 0.05, 0.09, chosen=True),
        FrontierPoint("coded", 5_000_000, 0.1, 0.2, chosen=False),
    ],
    beside=[FrontierPoint("svd", 9_000_000, 0.3, 0.4, chosen=False)],
)


def compressed(
    adapters: int = 4, *, names: list[str] | None = None, frontier: Frontier | None = FRONTIER
) -> Compression:
    """What came of compressing ``adapters`` from 100 MB to 10 MB with `coded`, their errors from 0.01 up to 0.5."""
    names = names or [f"team/adapter-{number:04d}" for number in range(adapters)]
    errors = np.random.default_rng(0).uniform(0.01, 0.5, len(names)).tolist()
    summary = summarise(len(names), errors, 10**8, 10**7)
    worst = int(np.argmax(errors))
    report = CompressReport(
        bundle="bundle",
        base_model="org/base",
        method="coded",
        rank=None,
        clusters=[],
        individual=names,
        skipped=[],
        zero=[],
        summary=summary,
        worst=WorstAdapter(names[worst], errors[worst]),
        seconds=1.0,
        warnings=quality_warnings(errors, summary, method="coded", max_error=None),
        device_peak_bytes=None,
    )
    entries = [
        AdapterEntry(
            name=name,
            scheme="coded",
            config="configs/0.json",
            files=[],
            squared_norm=1.0,
            squared_error=value,
            mean_module_squared_error=value,
            worst_module=ModuleError("layers.0.q_proj", value),
        )
        for name, value in zip(names, errors, strict=True)
    ]
    manifest = Manifest(
        created_by="lorazip",
        requires={},
        base_model="org/base",
        parameters=Parameters("coded", None, 0, "bf16", 0, "adapter", None),
        modules=[],
        module_sets=[],
        clusters=[],
        adapters=entries,
        skipped=[],
        files=[],
    )
    return Compression(report, manifest, frontier)


def planned(*, frontier: Frontier | None = FRONTIER) -> PlanReport:
    """A plan for 4 adapters of 100 MB."""
    method = "coded" if frontier else "joint"
    return PlanReport(
        base_model="org/base",
        adapters=4,
        modules=6,
        skipped=[],
        bytes_original=10**8,
        schemes=[PlannedScheme(method, None if frontier else 16, 0 if frontier else 2, 9_000_000, 0.91, chosen=True)],
        frontier=frontier.points if frontier else [],
        comparison="in 9.0 MB, coded is better" if frontier else None,
    )

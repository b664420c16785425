"""The page of ``cluster``: who shares a basis, how well, and whether another number of clusters would be better."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
from plotly.graph_objects import Scatter

from ..base.text import count, error, megabytes, saved, saving
from ..bundle.quality import LARGE_ERROR
from ..clustering.clusters_file import Assignment, Candidate
from . import page as skeleton
from .charts import COLOURS, GREY, NAMED_ROWS, Grid, Ticks, empty_figure, heat_map, twin_bars
from .page import Chart, Page, Table, Tile

_WORST = 20
_MOST_ROWS = 100
_MOST_CELLS = 1000
_LINES = 360


def page(assignment: Assignment, similarity: numpy.ndarray) -> str:
    """The page as HTML."""
    number = len(assignment.adapters)
    if similarity.shape != (number, number):
        raise ValueError(f"similarity has shape {similarity.shape}, but there are {number} adapters")
    sections: list[Table | Chart] = []
    if number > 1:
        sections.append(_similarity(assignment, similarity))
    if assignment.candidates:
        sections += [_by_clusters(assignment.candidates), _by_bytes(assignment.candidates)]
    if assignment.clusters:
        sections.append(_clusters(assignment))
    if len(assignment.objective) > 1:
        sections.append(_objective(assignment.objective))
    sections += [table for table in (_outliers(assignment), _duplicates(assignment), _worst(assignment)) if table.rows]
    troubled = len(assignment.outliers)
    return skeleton.render(
        Page(
            kind="lorazip cluster",
            title=f"{count(number, 'adapter')} in {count(len(assignment.clusters), 'cluster')}",
            verdict=count(troubled, "outlier") if troubled else "no outliers",
            good=None if troubled else True,
            lead=_lead(assignment),
            made=[
                "No limit on an error applies to clusters: compress and verify take --max-error. What is coloured has a"
                f" squared error above {LARGE_ERROR}, where tasks may suffer."
            ],
            tiles=_tiles(assignment),
            sections=sections,
        )
    )


def _lead(assignment: Assignment) -> str:
    rank = "" if assignment.rank is None else f", bases of rank {assignment.rank}"
    seed = "" if assignment.seed is None else f", seed {assignment.seed}"
    dtype = "" if assignment.dtype is None else f" in {assignment.dtype}"
    return f"Adapters of {assignment.base_model or 'an unnamed base model'}, method joint{rank}{dtype}{seed}."


def _tiles(assignment: Assignment) -> list[Tile]:
    errors = [adapter.squared_error for adapter in assignment.adapters]
    held_out = [adapter.held_out_squared_error for adapter in assignment.adapters]
    sizes = [cluster.adapters for cluster in assignment.clusters]
    tiles = [Tile("Adapters", f"{len(errors):,}"), Tile("Clusters", f"{len(sizes):,}", _range(sizes))]
    if errors:
        mean = float(numpy.mean(errors))
        tiles += [
            Tile("Mean error", error(mean), "squared, own cluster", mean > LARGE_ERROR),
            Tile("Worst error", error(max(errors)), "squared, own cluster", max(errors) > LARGE_ERROR),
            Tile("Held out", error(float(numpy.mean(held_out))), "mean, by the others alone"),
        ]
    for chosen in (candidate for candidate in assignment.candidates if candidate.chosen):
        tiles.append(Tile("Saved", saved(chosen.saved_ratio), f"bundle: {megabytes(chosen.bytes_bundle)}"))
    return tiles


def _range(sizes: Sequence[int]) -> str:
    if len(sizes) < 2:
        return ""
    least, most = min(sizes), max(sizes)
    return f"{count(most, 'adapter')} each" if least == most else f"{least:,} to {most:,} adapters each"


def _similarity(assignment: Assignment, similarity: numpy.ndarray) -> Chart:
    """Cluster by cluster, in each the best served adapter first; of very many, evenly spaced ones."""
    adapters = assignment.adapters
    order = sorted(range(len(adapters)), key=lambda i: (adapters[i].cluster, adapters[i].squared_error))
    if len(order) > _MOST_CELLS:
        order = [order[i] for i in numpy.linspace(0, len(order) - 1, _MOST_CELLS).round().astype(int)]
    values = similarity[numpy.ix_(order, order)]
    names = [adapters[i].name for i in order]
    owners = [adapters[i].cluster for i in order]
    starts = [place for place in range(len(order)) if place == 0 or owners[place] != owners[place - 1]]
    ends = [*starts[1:], len(order)]
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    clusters = Ticks(middles, [f"cluster {owners[start]}" for start in starts])
    few = len(starts) <= NAMED_ROWS // 2
    figure = heat_map(
        Grid(values, names, names),
        x="… held by the subspaces of this one",
        y="share of this adapter …",
        unit="share",
        most=_scale(values),
        columns=clusters if few else Ticks([], []),
        rows=None if len(names) <= NAMED_ROWS else clusters if few else Ticks([], []),
    )
    for border in starts[1:]:
        for ends_of_line in (
            {"x0": border - 0.5, "x1": border - 0.5, "y0": -0.5, "y1": len(order) - 0.5},
            {"y0": border - 0.5, "y1": border - 0.5, "x0": -0.5, "x1": len(order) - 0.5},
        ):
            figure.add_shape(type="line", line={"width": 2 if few else 1}, **ends_of_line)
    caption = (
        "Cluster by cluster, in each the adapter of least error first. A cluster that shares shows as a bright block;"
        " every adapter holds all of itself, so the diagonal is off the scale."
    )
    if len(order) < len(adapters):
        caption += f" {len(order):,} of {len(adapters):,} adapters, evenly spaced."
    return Chart("Similarity", figure, caption)


def _scale(values: numpy.ndarray) -> float:
    """The largest share off the diagonal, which would drown in a scale up to the 1 that is on it."""
    others = values[~numpy.eye(len(values), dtype=bool)]
    return float(others.max()) if others.size and others.max() > 0 else 1.0


def _by_clusters(candidates: Sequence[Candidate]) -> Chart:
    figure = empty_figure(_LINES, "number of clusters", "squared error, cost")
    joint = [candidate for candidate in candidates if candidate.method == "joint"]
    ranks = sorted({candidate.rank for candidate in joint})
    figures = (("mean error", "mean_squared_error"), ("worst error", "max_squared_error"), ("cost", "cost"))
    for number, rank in enumerate(ranks):
        points = sorted((each for each in joint if each.rank == rank), key=lambda each: each.clusters)
        for (name, field), colour in zip(figures, COLOURS, strict=False):
            figure.add_trace(
                Scatter(
                    name=name if len(ranks) == 1 else f"{name}, rank {rank}",
                    x=[each.clusters for each in points],
                    y=[getattr(each, field) for each in points],
                    mode="lines+markers",
                    line={"color": colour, "width": 2, "dash": ("solid", "dash", "dot", "dashdot")[number % 4]},
                    marker={"size": [11 if each.chosen else 6 for each in points]},
                    hovertext=[_said(each) for each in points],
                    hovertemplate=f"{name} %{{y:.4f}}<br>%{{hovertext}}<extra></extra>",
                )
            )
    ticks = sorted({candidate.clusters for candidate in joint})
    figure.update_xaxes(type="log", tickmode="array", tickvals=ticks, ticktext=[str(tick) for tick in ticks])
    svd = [candidate for candidate in candidates if candidate.method == "svd"]
    if svd and ticks:
        best = min(svd, key=lambda each: each.cost)
        figure.add_trace(
            Scatter(
                name=f"cost of svd, rank {best.rank}",
                x=[ticks[0], ticks[-1]],
                y=[best.cost, best.cost],
                mode="lines",
                line={"color": GREY, "width": 2, "dash": "dot"},
                hovertext=[_said(best)] * 2,
                hovertemplate="cost %{y:.4f}<br>%{hovertext}<extra></extra>",
            )
        )
    figure.update_yaxes(rangemode="tozero")
    caption = (
        "The cost is the mean squared error plus the bytes of the bundle as a share of the originals’: what is lost"
        f" and what is kept. Large points are what was chosen. {_measured_on(candidates)}"
    )
    return Chart("Number of clusters", figure, caption.strip())


def _by_bytes(candidates: Sequence[Candidate]) -> Chart:
    figure = empty_figure(_LINES, "bundle, MB", "mean squared error")
    series = sorted({(each.method, each.rank if each.method == "joint" else 0) for each in candidates})
    for (method, rank), colour in zip(series, [*COLOURS, *[GREY] * len(series)], strict=False):
        points = [each for each in candidates if each.method == method and (method == "svd" or each.rank == rank)]
        points.sort(key=lambda each: each.bytes_bundle)
        figure.add_trace(
            Scatter(
                name="svd, each adapter alone" if method == "svd" else f"joint, rank {rank}",
                x=[each.bytes_bundle / 1e6 for each in points],
                y=[each.mean_squared_error for each in points],
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker={"size": [11 if each.chosen else 6 for each in points]},
                hovertext=[_said(each) for each in points],
                hovertemplate="mean squared error %{y:.4f}<br>%{hovertext}<extra></extra>",
            )
        )
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(showlegend=True)
    return Chart("Error against size", figure, "Lower and further left is better. Large points are what was chosen.")


def _said(candidate: Candidate) -> str:
    what = count(candidate.clusters, "cluster") if candidate.method == "joint" else "svd"
    chosen = " (chosen)" if candidate.chosen else ""
    return (
        f"{what}, rank {candidate.rank}{chosen}<br>{megabytes(candidate.bytes_bundle)},"
        f" {saving(candidate.saved_ratio)}<br>worst {error(candidate.max_squared_error)}"
    )


def _measured_on(candidates: Sequence[Candidate]) -> str:
    on = {candidate.measured_on for candidate in candidates}
    return "Errors are those on the probe modules." if on == {"probes"} else ""


def _clusters(assignment: Assignment) -> Chart:
    clusters = assignment.clusters
    figure = twin_bars(
        [f"cluster {number}" for number in range(len(clusters))],
        ([cluster.adapters for cluster in clusters], [cluster.mean_squared_error for cluster in clusters]),
        titles=("adapters", "mean squared error"),
        hover=[
            f"<b>cluster {number}</b><br>{count(cluster.adapters, 'adapter')}"
            f"<br>squared error: mean {error(cluster.mean_squared_error)}, worst {error(cluster.max_squared_error)}"
            f"<br>similarity: within {_share(cluster.similarity_within)},"
            f" to others {_share(cluster.similarity_to_others)}"
            for number, cluster in enumerate(clusters)
        ],
    )
    return Chart("Clusters", figure, "How many adapters each has, and how well it serves them.")


def _objective(objective: Sequence[float]) -> Chart:
    figure = empty_figure(_LINES, "round", "sum of squared errors")
    figure.add_trace(
        Scatter(
            x=list(range(1, len(objective) + 1)),
            y=list(objective),
            mode="lines+markers",
            line={"color": COLOURS[0], "width": 2},
            hovertemplate="round %{x}: %{y:.6g}<extra></extra>",
        )
    )
    if len(objective) <= NAMED_ROWS // 2:
        figure.update_xaxes(tickmode="array", tickvals=list(range(1, len(objective) + 1)))
    return Chart("Objective", figure, "After each round of moving adapters and fitting bases; it never rises.")


def _worst(assignment: Assignment) -> Table:
    worst = sorted(assignment.adapters, key=lambda adapter: (-adapter.squared_error, adapter.name))[:_WORST]
    rows = [
        (
            adapter.name,
            str(adapter.cluster),
            error(adapter.squared_error),
            "-" if adapter.next_cluster is None else str(adapter.next_cluster),
            error(adapter.next_squared_error),
            error(adapter.held_out_squared_error),
            adapter.nearest or "-",
            _share(adapter.similarity),
        )
        for adapter in worst
    ]
    head = ("adapter", "cluster", "its error", "next best", "its error", "held out", "nearest", "share")
    more = f"The worst {len(rows):,} of {len(assignment.adapters):,}. " if len(rows) < len(assignment.adapters) else ""
    caption = (
        "Squared errors in the own cluster, in the next best one, and in a basis of the own cluster that was fitted"
        " without the adapter (held out); the adapter whose subspaces hold most of this one, and that share."
    )
    bad = frozenset(row for row, adapter in enumerate(worst) if adapter.squared_error > LARGE_ERROR)
    return Table("Worst adapters", head, rows, frozenset({1, 2, 3, 4, 5, 7}), more + caption, bad)


_REASONS = {
    "alone": "alone in its cluster: it has none to share with",
    "loses-most": "loses more than half of its update",
    "shares-nothing": "a basis of the others in its cluster would hold hardly any of it",
}


def _outliers(assignment: Assignment) -> Table:
    rows = [
        (each.name, error(each.squared_error), error(each.held_out_squared_error), _REASONS[each.reason])
        for each in assignment.outliers[:_MOST_ROWS]
    ]
    return Table(
        "Outliers",
        ("adapter", "squared error", "held out", "reason"),
        rows,
        frozenset({1, 2}),
        _first(len(rows), len(assignment.outliers)),
    )


def _duplicates(assignment: Assignment) -> Table:
    rows = [(each.first, each.second, error(each.squared_distance)) for each in assignment.near_duplicates[:_MOST_ROWS]]
    caption = "The squared distance is the share of the larger update by which the two differ."
    more = _first(len(rows), len(assignment.near_duplicates))
    head = ("adapter", "and", "squared distance")
    return Table("Near duplicates", head, rows, frozenset({2}), f"{more} {caption}".strip())


def _first(shown: int, of: int) -> str:
    return f"The first {shown:,} of {of:,}." if shown < of else ""


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

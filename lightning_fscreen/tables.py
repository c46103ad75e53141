"""Results of many runs as a Markdown table and as curves: mean ± standard deviation over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Results = Sequence[Mapping[str, Any]]

METRICS = {"test_error": "test error", "val_error": "validation error"}


def metric_of(table: Mapping[str, Any]) -> str:
    """What a table compares: "test_error", or, for what is to be chosen by it, "val_error".

    Raises:
        ValueError: its `metric` is neither.
    """
    metric = str(table.get("metric", "test_error"))
    if metric not in METRICS:
        raise ValueError(f"table {table['name']!r} has metric={metric!r}; choose one of {list(METRICS)}")
    return metric


def grouped(results: Results, metric: str = "test_error") -> dict[tuple[str, str, float | None], list[float]]:
    """Errors in % by (setting, method, amount), in the order of the seeds."""
    groups: dict[tuple[str, str, float | None], list[float]] = {}
    for line in sorted(results, key=lambda line: line["seed"]):
        key = (line["setting"], line["method"], line["amount"])
        groups.setdefault(key, []).append(100 * line[metric])
    return groups


def summary(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; a dash for no values."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def markdown(table: Mapping[str, Any], results: Results) -> str:
    """One row for every method, one column for every setting and amount: error of the last epoch, %."""
    metric = metric_of(table)
    groups = grouped(results, metric)
    amounts = table["amounts"]
    columns = [(setting, amount) for setting in table["settings"] for amount in amounts]
    seeds = sorted({len(values) for values in groups.values()})
    names = [f"{100 * amount:g} % pruned" for _, amount in columns]
    if all(table["settings"]):
        single = len(amounts) == 1
        names = [column[0] if single else f"{column[0]}, {name}" for column, name in zip(columns, names, strict=True)]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(columns) + 1) + "|"]
    for method in table["methods"]:
        cells = []
        for setting, amount in columns:
            values = groups.get((setting, method, amount)) or groups.get((setting, method, None), [])
            cells.append(summary(values) + ("" if len(seeds) == 1 or not values else f" ({len(values)})"))
        if any(cell != "–" for cell in cells):
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    plural = "" if seeds == [1] else "s"
    count = f"{seeds[0]} seed{plural}" if len(seeds) == 1 else "number of seeds in brackets"
    caption = f"({METRICS[metric].capitalize()} of the last epoch in %, mean ± standard deviation, {count}.)"
    return "\n".join([*lines, "", caption, ""])


def curves(table: Mapping[str, Any], results: Results) -> Figure:
    """A panel for every setting: error against what is kept, a line for every method; of a single amount, a dot."""
    metric = metric_of(table)
    groups = grouped(results, metric)
    settings = list(table["settings"])
    methods = [name for name in table["methods"] if any(method == name for _, method, _ in groups)]
    single = len(table["amounts"]) == 1
    height = 1.6 + 0.3 * len(methods) if single else 4.2
    figure = Figure(figsize=(2.2 + 3.4 * len(settings), height), layout="constrained")
    panels = figure.subplots(1, len(settings), squeeze=False, sharex=single, sharey=single)[0]
    for axes, setting in zip(panels, settings, strict=True):
        if single:
            _draw_dots(axes, groups, setting, methods, table["amounts"][0])
            axes.set_xlabel(f"{METRICS[metric]} [%], {100 * table['amounts'][0]:g} % pruned")
        else:
            _draw_lines(axes, groups, setting, methods, sorted(table["amounts"]))
        axes.set_title(setting)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if not single:
        panels[0].set_ylabel(f"{METRICS[metric]} [%]")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


Groups = Mapping[tuple[str, str, float | None], Sequence[float]]


def _draw_dots(axes: Axes, groups: Groups, setting: str, methods: Sequence[str], amount: float) -> None:
    there = [name for name in methods if any((setting, name, key) in groups for key in (amount, None))]
    for place, method in enumerate(reversed(there)):
        values = groups.get((setting, method, amount)) or groups[setting, method, None]
        axes.errorbar(statistics.fmean(values), place, xerr=_deviation(values), marker="o", capsize=3, color="C0")
    axes.set_yticks(range(len(there)), there[::-1])


def _draw_lines(axes: Axes, groups: Groups, setting: str, methods: Sequence[str], amounts: Sequence[float]) -> None:
    for method in methods:
        points = [(amount, values) for amount in amounts if (values := groups.get((setting, method, amount)))]
        if points:
            kept = [100 * (1 - amount) for amount, _ in points]
            means = [statistics.fmean(values) for _, values in points]
            spread = [_deviation(values) for _, values in points]
            axes.errorbar(kept, means, spread, label=method, marker="o", ms=4, capsize=2)
        if dense := groups.get((setting, method, None)):
            axes.axhline(statistics.fmean(dense), color="grey", ls="--", lw=1, label=method)
    axes.set_xscale("log")
    kept = [100 * (1 - amount) for amount in amounts]
    axes.set_xticks(kept, [f"{value:.3g}" for value in kept])
    axes.minorticks_off()
    axes.set_xlabel("candidates kept [%]")


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0

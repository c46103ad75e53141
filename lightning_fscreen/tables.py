"""Results of many runs as a Markdown table and as curves: mean ± standard deviation over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

Results = Sequence[Mapping[str, Any]]


def grouped(results: Results) -> dict[tuple[str, str, float | None], list[float]]:
    """Test errors in % by (setting, method, amount), in the order of the seeds."""
    groups: dict[tuple[str, str, float | None], list[float]] = {}
    for line in sorted(results, key=lambda line: line["seed"]):
        key = (line["setting"], line["method"], line["amount"])
        groups.setdefault(key, []).append(100 * line["test_error"])
    return groups


def summary(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± (sample) standard deviation, with the number of values where it is not known from elsewhere."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(table: Mapping[str, Any], results: Results) -> str:
    """One row for every method, one column for every setting and amount: test error of the last epoch, %."""
    groups = grouped(results)
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
    return "\n".join(lines) + f"\n\n(Test error of the last epoch in %, mean ± standard deviation, {count}.)\n"


def curves(table: Mapping[str, Any], results: Results) -> Figure:
    """Error against what is kept, a line for every method and a panel for every setting."""
    groups = grouped(results)
    settings = list(table["settings"])
    figure = Figure(figsize=(1.5 + 4.5 * len(settings), 4.2), layout="constrained")
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    for axes, setting in zip(panels, settings, strict=True):
        for method in table["methods"]:
            points = [
                (100 * (1 - amount), values)
                for amount in sorted(table["amounts"])
                if (values := groups.get((setting, method, amount)))
            ]
            if points:
                means = [statistics.fmean(values) for _, values in points]
                spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
                axes.errorbar([kept for kept, _ in points], means, spread, label=method, marker="o", ms=4, capsize=2)
            if dense := groups.get((setting, method, None)):
                axes.axhline(statistics.fmean(dense), color="grey", ls="--", lw=1, label=method)
        axes.set_xscale("log")
        axes.set_xlabel("candidates kept [%]")
        axes.set_title(setting)
    panels[0].set_ylabel("test error [%]")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    return figure

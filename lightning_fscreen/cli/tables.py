"""Results of many runs as a Markdown table and as curves: mean ± standard deviation over seeds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

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
    """Error of the last epoch, %: a row for every method, a column for every setting and amount.

    With more settings than methods, a row for every setting, and a column for every method and amount.
    """
    metric = metric_of(table)
    groups = grouped(results, metric)
    seeds = sorted({len(values) for values in groups.values()})

    def cell(setting: str, method: str, amount: float | None) -> str:
        values = groups.get((setting, method, amount)) or groups.get((setting, method, None), [])
        return summary(values) + ("" if len(seeds) == 1 or not values else f" ({len(values)})")

    found = {method: [amount for _, other, amount in groups if other == method] for method in table["methods"]}
    methods = [method for method in table["methods"] if found[method]]
    if len(table["settings"]) > len(methods):
        pairs = [(method, amount) for method in methods for amount in _amounts(table, found[method])]
        rows = [("", [_titled(method, amount) for method, amount in pairs])]
        rows += [(setting, [cell(setting, *pair) for pair in pairs]) for setting in table["settings"]]
    else:
        columns = [(setting, amount) for setting in table["settings"] for amount in table["amounts"]]
        single = len(table["amounts"]) == 1 and all(table["settings"])
        rows = [("", [setting if single else _titled(setting, amount) for setting, amount in columns])]
        rows += [(method, [cell(setting, method, amount) for setting, amount in columns]) for method in methods]
    lines = [f"| {' | '.join([name, *cells])} |" for name, cells in rows]
    lines[0] = lines[0].replace("|  |", "| |", 1)
    plural = "" if seeds == [1] else "s"
    count = f"{seeds[0]} seed{plural}" if len(seeds) == 1 else "number of seeds in brackets"
    caption = f"({METRICS[metric].capitalize()} of the last epoch in %, mean ± standard deviation, {count}.)"
    return "\n".join([lines[0], "|---" * (len(rows[0][1]) + 1) + "|", *lines[1:], "", caption, ""])


def _amounts(table: Mapping[str, Any], found: Sequence[float | None]) -> list[float | None]:
    """Amounts of a method in the table's order; None for one that prunes nothing."""
    return [amount for amount in (*table["amounts"], None) if amount in found]


def _titled(name: str, amount: float | None) -> str:
    """The title of a column: a name, a share pruned, or both."""
    return ", ".join(filter(None, (name, "" if amount is None else f"{100 * amount:g} % pruned")))


def by_layer(table: Mapping[str, Any], results: Results) -> str:
    """Candidates kept of every layer, mean over the seeds; a row for every layer, setting and method that prunes."""
    kept: dict[tuple[str, str, str, float], list[int]] = {}
    total: dict[tuple[str, str], int] = {}
    for line in results:
        for layer in line.get("layers", []):
            place = layer["name"], line["setting"]
            total[place] = layer["total"]
            kept.setdefault((*place, line["method"], line["amount"]), []).append(layer["kept"])
    names = ["layer", "of", "method", *(f"{100 * amount:g} % pruned" for amount in table["amounts"])]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for (name, setting), method in itertools.product(total, table["methods"]):
        found = [kept.get((name, setting, method, amount), []) for amount in table["amounts"]]
        if any(found):
            cells = [f"{statistics.fmean(values):,.0f}" if values else "–" for values in found]
            label = ", ".join(filter(None, (method, setting)))
            lines.append(f"| {name} | {total[name, setting]:,} | {label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "(Kept of every layer, mean over the seeds.)", ""])


def curves(table: Mapping[str, Any], results: Results) -> Figure:
    """A panel for every setting, a line for every method: error against the share kept; of a single amount, a dot.

    Where networks became smaller, a second row has the error against the multiply–adds that are left. Errors that
    differ by more than a factor of ten are drawn on a logarithmic axis.
    """
    groups = grouped(results, metric_of(table))
    methods = [name for name in table["methods"] if any(method == name for _, method, _ in groups)]
    single = len(table["amounts"]) == 1
    figure = _dots(table, methods, groups) if single else _lines(table, methods, groups, results)
    means = [statistics.fmean(values) for values in groups.values()]
    for axes in figure.axes:
        if 0 < 10 * min(means) < max(means):
            _make_logarithmic(axes.xaxis if single else axes.yaxis)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


Key = tuple[str, str, float | None]
Groups = Mapping[Key, Sequence[float]]


def _dots(table: Mapping[str, Any], methods: Sequence[str], groups: Groups) -> Figure:
    """A panel for every setting."""
    settings, (amount,) = list(table["settings"]), table["amounts"]
    figure = Figure(figsize=(2.2 + 3.4 * len(settings), 1.6 + 0.3 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(settings), squeeze=False, sharex=True, sharey=True)[0]
    for axes, setting in zip(panels, settings, strict=True):
        there = [name for name in methods if any((setting, name, key) in groups for key in (amount, None))]
        for place, method in enumerate(reversed(there)):
            values = groups.get((setting, method, amount)) or groups[setting, method, None]
            axes.errorbar(statistics.fmean(values), place, xerr=_deviation(values), marker="o", capsize=3, color="C0")
        axes.set_yticks(range(len(there)), there[::-1])
        axes.set_xlabel(f"{METRICS[metric_of(table)]} [%], {100 * amount:g} % pruned")
        axes.set_title(setting)
    return figure


def _lines(table: Mapping[str, Any], methods: Sequence[str], groups: Groups, results: Results) -> Figure:
    """A column for every setting, a row for every share kept."""
    settings, amounts = list(table["settings"]), sorted(table["amounts"])
    places = [("candidates kept [%]", {key: 100 * (1 - key[2]) for key in groups if key[2] is not None})]
    if macs := _macs_kept(results):
        places.append(("multiply–adds kept [%]", macs))
    figure = Figure(figsize=(2.2 + 3.4 * len(settings), 0.8 + 3.4 * len(places)), layout="constrained")
    panels = figure.subplots(len(places), len(settings), squeeze=False)
    for (label, kept), row in zip(places, panels, strict=True):
        for axes, setting in zip(row, settings, strict=True):
            _draw_lines(axes, groups, setting, methods, kept)
            axes.set_xlabel(label)
            axes.set_title(setting)
        row[0].set_ylabel(f"{METRICS[metric_of(table)]} [%]")
    ticks = [100 * (1 - amount) for amount in amounts]
    for axes in panels[0]:
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{value:.3g}" for value in ticks])
        axes.minorticks_off()
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _macs_kept(results: Results) -> dict[Key, float]:
    """In %, mean over the seeds, by (setting, method, amount); empty if no network became smaller."""
    kept: dict[Key, list[float]] = {}
    for line in results:
        macs = line.get("macs")
        if line["amount"] is not None and macs and macs["before"] and macs["after"]:
            key = (line["setting"], line["method"], line["amount"])
            kept.setdefault(key, []).append(100 * macs["after"] / macs["before"])
    smaller = any(value < 100 for values in kept.values() for value in values)
    return {key: statistics.fmean(values) for key, values in kept.items()} if smaller else {}


def _draw_lines(axes: Axes, groups: Groups, setting: str, methods: Sequence[str], kept: Mapping[Key, float]) -> None:
    """Error against the share kept, in %, by (setting, method, amount)."""
    if len(methods) > 10:  # as many colours as there are by default
        axes.set_prop_cycle(color=colormaps["tab20"].colors)  # type: ignore[attr-defined]
    for method in methods:
        keys = sorted(key for key in kept if key[:2] == (setting, method))  # by amount
        if keys:
            means, spread = [statistics.fmean(groups[key]) for key in keys], [_deviation(groups[key]) for key in keys]
            axes.errorbar([kept[key] for key in keys], means, spread, label=method, marker="o", ms=4, capsize=2)
        if dense := groups.get((setting, method, None)):
            axes.axhline(statistics.fmean(dense), color="grey", ls="--", lw=1, label=method)


def _make_logarithmic(axis: Axis) -> None:
    """With numbers as they are read, instead of powers of ten; bars that reach below zero end at the border."""
    scale = axis.axes.set_xscale if isinstance(axis, XAxis) else axis.axes.set_yscale
    scale("log", nonpositive="clip")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0

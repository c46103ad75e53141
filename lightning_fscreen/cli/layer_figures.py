"""Pictures of the layers of a network: how much each of them keeps, and how a metric depends on it.

Pure functions from numbers to `matplotlib.figure.Figure`, as in `figures`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_fscreen.cli.figure_style import BLUE, LIGHT, ORANGE, RED, finish, new_figure, percent, ratio, short
from lightning_fscreen.tables import listing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_fscreen.trained.sensitivities import Sensitivity

_MAX_BARS = 40
_MAX_TICKS = 24


def layers_figure(names: Sequence[str], total: Sequence[int], kept: Sequence[int]) -> Figure:
    """Draw the fraction of its candidates that every layer keeps: bars with numbers, or a profile of a deep network.

    Args:
        names: the layers, in the order of the network.
        total: candidates per layer.
        kept: candidates per layer that remain.
    """
    if len(names) <= _MAX_BARS:
        return _layer_bars(names, total, kept)
    return _layer_profile(names, total, kept)


def units_figure(names: Sequence[str], total: Sequence[int], kept: Sequence[int], noun: str) -> Figure:
    """Draw how many units every layer had and has (the paper's Fig. 3).

    Args:
        names: the layers, in the order of the network.
        total: units per layer before.
        kept: units per layer that remain.
        noun: how they are called, "channels" for instance.
    """
    figure = new_figure(10.0, 4.8)
    axes = figure.subplots()
    where = range(len(names))
    axes.bar(where, total, width=0.85, color=LIGHT, label=f"before: {sum(total):,}")
    axes.bar(where, kept, width=0.85, color=BLUE, label=f"after: {sum(kept):,}")
    _name_layers(axes, names)
    axes.set_ylabel(noun)
    axes.set_title(f"{noun.capitalize()} of every layer")
    finish(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def sensitivity_figure(found: Sensitivity) -> Figure:
    """Draw a metric with some units of one group masked: a field for every group and fraction."""
    names = [short(listing(group.layers)) for group in found.groups]
    figure = new_figure(3.5 + 1.2 * len(found.fractions), 1.6 + 0.3 * len(names))
    axes = figure.subplots()
    fields = axes.imshow([group.metrics for group in found.groups], aspect="auto", cmap="cividis")
    axes.set_xticks(range(len(found.fractions)), [percent(fraction) for fraction in found.fractions])
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("masked units of one group")
    axes.set_title(f"The metric, {found.metric:.4g} as the network is", fontsize="medium")
    figure.colorbar(fields, ax=axes)
    return figure


def _layer_bars(names: Sequence[str], total: Sequence[int], kept: Sequence[int]) -> Figure:
    """Horizontal bars with their numbers, and one for all layers together."""
    rows = [(short(name), k, t, BLUE) for name, k, t in zip(names, kept, total, strict=True)]
    if len(rows) != 1:
        rows.append(("all layers", sum(kept), sum(total), ORANGE))
    figure = new_figure(8.0, 1.3 + 0.3 * len(rows))
    axes = figure.subplots()
    where = range(len(rows))
    axes.barh(where, [100] * len(rows), height=0.7, color=LIGHT)
    axes.barh(where, [100 * ratio(k, t) for _, k, t, _ in rows], height=0.7, color=[row[3] for row in rows])
    for y, (_, k, t, _) in enumerate(rows):
        text = f"{k:,} of {t:,} ({percent(ratio(k, t))})"
        axes.text(1.015, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize="small")
    axes.set_yticks(where, [row[0] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("kept (% of the candidates of the layer)")
    axes.set_title("What every layer keeps")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _layer_profile(names: Sequence[str], total: Sequence[int], kept: Sequence[int]) -> Figure:
    """One thin bar per layer in the order of the network, every few of them named."""
    figure = new_figure(10.0, 4.8)
    axes = figure.subplots()
    where = range(len(names))
    fractions = [100 * ratio(k, t) for k, t in zip(kept, total, strict=True)]
    overall = ratio(sum(kept), sum(total))
    axes.bar(where, fractions, width=0.85, color=BLUE, label="layer")
    axes.axhline(
        100 * overall,
        color=RED,
        linewidth=1.5,
        linestyle=(0, (4, 3)),
        label=f"all layers: {sum(kept):,} of {sum(total):,} ({percent(overall)})",
    )
    _name_layers(axes, names)
    axes.set_ylim(0, 103)
    axes.set_ylabel("kept (% of the candidates)")
    axes.set_title("What every layer keeps")
    finish(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def _name_layers(axes: Axes, names: Sequence[str]) -> None:
    """Name every few of the bars."""
    ticks = range(0, len(names), math.ceil(len(names) / _MAX_TICKS))
    axes.set_xticks(ticks, [short(names[i]) for i in ticks], rotation=45, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="x", labelsize="small")
    axes.set_xlim(-1, len(names))
    axes.set_xlabel(f"layer, in the order of the network ({len(names)} layers)")

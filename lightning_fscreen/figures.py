"""Pictures of a pruning run: the schedule, the connections, the weights and the layers that remain.

Pure functions from numbers to `matplotlib.figure.Figure`, without pyplot and its global state. matplotlib comes with
the extra `cli` and is imported when the first figure is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightning_fscreen.files import replacing

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

_DPI = 150

# Okabe and Ito's palette, which the colour-blind can tell apart.
_BLUE, _ORANGE, _GREEN, _RED, _SKY, _PINK, _YELLOW = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
    "#B8A800",  # darkened: the original is too faint for lines on white
)
_DARK, _GREY, _LIGHT = "#333333", "#8C8C8C", "#E6E6E6"
_LAYER_COLOURS = (_BLUE, _ORANGE, _GREEN, _RED, _SKY, _PINK, _YELLOW, _DARK)

_MAX_OUTLINES = len(_LAYER_COLOURS)
_MAX_BARS = 40
_MAX_TICKS = 24
_MATRIX_ROWS, _MATRIX_COLUMNS = 500, 1000  # what the connection matrix has pixels for
_MATRIX_RATIO = (0.5, 3.2)  # width to height; outside of it, the matrix is stretched
_NUM_BINS = 101  # odd: one bin is centred on zero


def schedule_figure(
    epochs: Sequence[int],
    scheduled: Sequence[float],
    applied: Sequence[float],
    *,
    curve: tuple[Sequence[float], Sequence[float]] | None,
    start_epoch: float,
    end_epoch: float,
    amount: float,
) -> Figure:
    """Draw the annealing function with the sparsity really applied on it (the paper's Fig. 1).

    All epochs are counted as trained: 1 is the end of the first one, and the window [start_epoch, end_epoch] is in the
    same unit, so that fine-tuning begins at `end_epoch`.

    Args:
        epochs: where the sparsity was measured.
        scheduled: the fraction of the candidates that the schedule asked for there.
        applied: the fraction that was pruned there.
        curve: (epochs, fractions) of the schedule, dense enough for a smooth line; None draws it through `scheduled`.
        start_epoch: where the window starts.
        end_epoch: where it ends.
        amount: the fraction pruned in the end.
    """
    figure = _new_figure(7.0, 4.4)
    axes = figure.subplots()
    line = (list(epochs), list(scheduled)) if curve is None else (list(curve[0]), list(curve[1]))
    last = max([1.0, *map(float, epochs), *(line[0] if curve is not None else []), float(end_epoch)])

    if end_epoch < last:
        axes.axvspan(end_epoch, last, color=_LIGHT, alpha=0.7, linewidth=0, label="fine-tuning")
    axes.axhline(100 * amount, color=_GREY, linewidth=1, linestyle=(0, (4, 3)), label=f"amount: {_percent(amount)}")
    axes.plot(line[0], [100 * y for y in line[1]], color=_BLUE, linewidth=2, label="schedule")
    if len(epochs) > 0:
        size = min(5.5, max(2.5, 260 / len(epochs)))
        axes.plot(
            epochs,
            [100 * y for y in applied],
            "o",
            markersize=size,
            color=_RED,
            markeredgecolor="white",
            markeredgewidth=0.6 if size > 4 else 0,
            label="pruned at the end of an epoch",
            zorder=3,
        )

    axes.set_xlim(0, 1.015 * last)
    axes.set_ylim(-3, 103)
    axes.set_xlabel("epochs trained")
    axes.set_ylabel("pruned (% of the candidates)")
    _integer_ticks(axes, "x")
    axes.set_title(f"Annealing from epoch {start_epoch:g} to {end_epoch:g}")
    _finish(axes)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return figure


def connections_figure(mask: Tensor, image_shape: tuple[int, int, int] | None) -> Figure:
    """Draw the connections that remain in a layer that reads an image (the paper's Fig. 2).

    Args:
        mask: (out, in) boolean, True where a connection remains.
        image_shape: (channels, height, width) of the image whose flattened pixels are the inputs. Where it is None or
            does not hold `in` numbers, the picture of the pixels is left out.
    """
    kept = mask.detach().to("cpu", torch.bool).numpy()
    units, inputs = kept.shape
    is_image = image_shape is not None and math.prod(image_shape) == inputs > 0

    # Panels of one height and of the contents' proportions; a long or tall matrix is stretched instead.
    matrix_width = min(max(inputs / max(units, 1), _MATRIX_RATIO[0]), _MATRIX_RATIO[1])
    if is_image and image_shape is not None:
        pixels_width = image_shape[2] / image_shape[1]
        height = min(3.6, 12.0 / (pixels_width + matrix_width))
        figure = _new_figure(height * (pixels_width + matrix_width) + 2.7, height + 1.2)
        pixels, matrix = figure.subplots(1, 2, width_ratios=[pixels_width + 0.9 / height, matrix_width])
        _draw_pixels(figure, pixels, kept, image_shape)
    else:
        height = min(3.6, 10.0 / matrix_width)
        figure = _new_figure(max(height * matrix_width + 1.0, 5.5), height + 1.2)
        matrix = figure.subplots()
    _draw_matrix(matrix, kept)
    remaining = int(kept.sum())
    figure.suptitle(f"{remaining:,} of {kept.size:,} connections remain ({_percent(_ratio(remaining, kept.size))})")
    return figure


def weights_figure(weights: Mapping[str, Tensor], before: Mapping[str, Tensor] | None = None) -> Figure:
    """Draw the histogram of the weights that remain (the paper's Fig. 4), on a logarithmic scale.

    Up to eight layers also get an outline of their own.

    Args:
        weights: layer → weights of any shape; zeros are pruned weights and left out.
        before: the same before pruning, to be drawn behind.
    """
    values = {name: _nonzero(weight) for name, weight in weights.items()}
    earlier = {name: _nonzero(weight) for name, weight in (before or {}).items()}
    limit = max((float(v.abs().max()) for v in [*values.values(), *earlier.values()] if v.numel()), default=0.0) or 1.0
    edges = np.linspace(-limit, limit, _NUM_BINS + 1)

    def histogram(value: Tensor) -> npt.NDArray[np.int64]:
        return np.histogram(value.numpy(), bins=edges)[0]

    def total(layers: Mapping[str, Tensor]) -> npt.NDArray[np.int64]:
        return sum((histogram(value) for value in layers.values()), start=np.zeros(_NUM_BINS, dtype=np.int64))

    figure = _new_figure(7.0, 4.6)
    axes = figure.subplots()
    count = sum(value.numel() for value in values.values())
    if before is not None:
        count_before = sum(value.numel() for value in earlier.values())
        axes.stairs(
            total(earlier), edges, fill=True, color=_LIGHT, label=f"before pruning ({count_before:,})", baseline=0.5
        )
    axes.stairs(total(values), edges, fill=True, color="#B9B9B9", label=f"all layers ({count:,})", baseline=0.5)
    if 1 < len(values) <= _MAX_OUTLINES:
        for colour, (name, value) in zip(_LAYER_COLOURS, values.items(), strict=False):
            label = f"{_short(name)} ({value.numel():,})"
            axes.stairs(histogram(value), edges, color=colour, linewidth=1.3, label=label, baseline=0.5)

    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    if count == 0 and not earlier:
        axes.set_ylim(top=10)
    axes.set_xlim(-1.02 * limit, 1.02 * limit)
    axes.set_xlabel("weight")
    axes.set_ylabel("number of weights per bin")
    axes.set_title(f"{count:,} weights remain" if count else "No weights remain")
    _finish(axes)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return figure


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


def channels_figure(names: Sequence[str], total: Sequence[int], kept: Sequence[int]) -> Figure:
    """Draw how many channels every layer had and has (the paper's Fig. 3).

    Args:
        names: the layers, in the order of the network.
        total: channels per layer before.
        kept: channels per layer that remain.
    """
    figure = _new_figure(10.0, 4.8)
    axes = figure.subplots()
    where = range(len(names))
    axes.bar(where, total, width=0.85, color=_LIGHT, label=f"before: {sum(total):,}")
    axes.bar(where, kept, width=0.85, color=_BLUE, label=f"after: {sum(kept):,}")
    _name_layers(axes, names)
    axes.set_ylabel("channels")
    axes.set_title("Channels of every layer")
    _finish(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def save_figures(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write figures as NAME.png into a folder, made if need be; a reader never sees half a file.

    Returns:
        The files, in the order of the figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        with replacing(path) as partial:
            figure.savefig(partial, format="png", dpi=_DPI)
        paths.append(path)
    return paths


def _draw_pixels(figure: Figure, axes: Axes, kept: npt.NDArray[np.bool_], image_shape: tuple[int, int, int]) -> None:
    """Number of connections that remain per pixel, in the shape of the image."""
    counts = kept.sum(0).reshape(image_shape).sum(0)
    image = axes.imshow(counts, cmap="viridis", vmin=0, vmax=max(int(counts.max()), 1), interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("connections per pixel")
    bar.outline.set_visible(False)
    bar.locator = _integer_locator()
    bar.update_ticks()
    axes.set_xlabel("column (pixels)")
    axes.set_ylabel("row (pixels)")
    _integer_ticks(axes, "both")
    axes.set_title("Where they start in the image", fontsize="medium")


def _draw_matrix(axes: Axes, kept: npt.NDArray[np.bool_]) -> None:
    """Units × inputs as a binary picture, in blocks where there are more of them than pixels."""
    from matplotlib.colors import ListedColormap

    units, inputs = kept.shape
    high, wide = max(1, math.ceil(units / _MATRIX_ROWS)), max(1, math.ceil(inputs / _MATRIX_COLUMNS))
    rows, columns = max(1, math.ceil(units / high)), max(1, math.ceil(inputs / wide))
    padded = np.zeros((rows * high, columns * wide), dtype=bool)
    padded[:units, :inputs] = kept
    blocks = padded.reshape(rows, high, columns, wide).any(axis=(1, 3))
    axes.imshow(
        blocks,
        cmap=ListedColormap(["white", _BLUE]),
        vmin=0,
        vmax=1,
        interpolation="nearest",
        aspect="equal" if _MATRIX_RATIO[0] <= inputs / max(units, 1) <= _MATRIX_RATIO[1] else "auto",
        extent=(-0.5, columns * wide - 0.5, rows * high - 0.5, -0.5),
    )
    axes.set_xlim(-0.5, max(inputs, 1) - 0.5)
    axes.set_ylim(max(units, 1) - 0.5, -0.5)
    axes.set_xlabel("input")
    axes.set_ylabel("unit")
    _integer_ticks(axes, "both")
    title = "Connection matrix"
    axes.set_title(title if high * wide == 1 else f"{title} (a dot: any of {high}×{wide})", fontsize="medium")


def _layer_bars(names: Sequence[str], total: Sequence[int], kept: Sequence[int]) -> Figure:
    """Horizontal bars with their numbers, and one for all layers together."""
    rows = [(_short(name), k, t, _BLUE) for name, k, t in zip(names, kept, total, strict=True)]
    if len(rows) != 1:
        rows.append(("all layers", sum(kept), sum(total), _ORANGE))
    figure = _new_figure(8.0, 1.3 + 0.3 * len(rows))
    axes = figure.subplots()
    where = range(len(rows))
    axes.barh(where, [100] * len(rows), height=0.7, color=_LIGHT)
    axes.barh(where, [100 * _ratio(k, t) for _, k, t, _ in rows], height=0.7, color=[row[3] for row in rows])
    for y, (_, k, t, _) in enumerate(rows):
        text = f"{k:,} of {t:,} ({_percent(_ratio(k, t))})"
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
    figure = _new_figure(10.0, 4.8)
    axes = figure.subplots()
    where = range(len(names))
    fractions = [100 * _ratio(k, t) for k, t in zip(kept, total, strict=True)]
    overall = _ratio(sum(kept), sum(total))
    axes.bar(where, fractions, width=0.85, color=_BLUE, label="layer")
    axes.axhline(
        100 * overall,
        color=_RED,
        linewidth=1.5,
        linestyle=(0, (4, 3)),
        label=f"all layers: {sum(kept):,} of {sum(total):,} ({_percent(overall)})",
    )
    _name_layers(axes, names)
    axes.set_ylim(0, 103)
    axes.set_ylabel("kept (% of the candidates)")
    axes.set_title("What every layer keeps")
    _finish(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def _name_layers(axes: Axes, names: Sequence[str]) -> None:
    """Name every few of the bars."""
    ticks = range(0, len(names), math.ceil(len(names) / _MAX_TICKS))
    axes.set_xticks(ticks, [_short(names[i]) for i in ticks], rotation=45, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="x", labelsize="small")
    axes.set_xlim(-1, len(names))
    axes.set_xlabel(f"layer, in the order of the network ({len(names)} layers)")


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError("figures need matplotlib; install it with: pip install lightning-fscreen[cli]") from error
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    return Figure(figsize=(width, height), layout=layout, facecolor="white")


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)


def _integer_ticks(axes: Axes, which: str) -> None:
    if which in ("x", "both"):
        axes.xaxis.set_major_locator(_integer_locator())
    if which in ("y", "both"):
        axes.yaxis.set_major_locator(_integer_locator())


def _integer_locator() -> MaxNLocator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6, integer=True, min_n_ticks=1)


def _nonzero(weight: Tensor) -> Tensor:
    flat = weight.detach().to("cpu", torch.float32).flatten()
    return flat[(flat != 0) & flat.isfinite()]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _percent(fraction: float) -> str:
    """Rounded to one digit, but never to 0 % or 100 % what is not."""
    digits = 1
    while digits < 6 and 0 < fraction < 1 and float(f"{100 * fraction:.{digits}f}") in (0.0, 100.0):
        digits += 1
    text = f"{100 * fraction:.{digits}f}"
    return f"{text.removesuffix('.0')} %"


def _short(name: str, limit: int = 32) -> str:
    """Long names lose their middle: both ends tell layers apart."""
    if len(name) <= limit:
        return name
    half = (limit - 1) // 2
    return f"{name[:half]}…{name[-half:]}"

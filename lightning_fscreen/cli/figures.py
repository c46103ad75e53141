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

from lightning_fscreen.cli.figure_style import (
    BLUE,
    GREY,
    LAYER_COLOURS,
    LIGHT,
    RED,
    finish,
    integer_locator,
    integer_ticks,
    new_figure,
    percent,
    ratio,
    short,
)
from lightning_fscreen.files import replacing

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 150

_MAX_OUTLINES = len(LAYER_COLOURS)
_MATRIX_ROWS, _MATRIX_COLUMNS = 500, 1000  # pixels of the connection matrix
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
    unit: str = "epoch",
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
        unit: what is counted, if it is no epochs.
    """
    figure = new_figure(7.0, 4.4)
    axes = figure.subplots()
    line = (list(epochs), list(scheduled)) if curve is None else (list(curve[0]), list(curve[1]))
    last = max([1.0, *map(float, epochs), *(line[0] if curve is not None else []), float(end_epoch)])

    if end_epoch < last:
        axes.axvspan(end_epoch, last, color=LIGHT, alpha=0.7, linewidth=0, label="fine-tuning")
    axes.axhline(100 * amount, color=GREY, linewidth=1, linestyle=(0, (4, 3)), label=f"amount: {percent(amount)}")
    axes.plot(line[0], [100 * y for y in line[1]], color=BLUE, linewidth=2, label="schedule")
    if len(epochs) > 0:
        size = min(5.5, max(2.5, 260 / len(epochs)))
        axes.plot(
            epochs,
            [100 * y for y in applied],
            "o",
            markersize=size,
            color=RED,
            markeredgecolor="white",
            markeredgewidth=0.6 if size > 4 else 0,
            label="pruned at the end of an epoch" if unit == "epoch" else "pruned",
            zorder=3,
        )

    axes.set_xlim(0, 1.015 * last)
    axes.set_ylim(-3, 103)
    axes.set_xlabel(f"{unit}s trained")
    axes.set_ylabel("pruned (% of the candidates)")
    integer_ticks(axes, "x")
    axes.set_title(f"Annealing from {unit} {start_epoch:g} to {end_epoch:g}")
    finish(axes)
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
        figure = new_figure(height * (pixels_width + matrix_width) + 2.7, height + 1.2)
        pixels, matrix = figure.subplots(1, 2, width_ratios=[pixels_width + 0.9 / height, matrix_width])
        _draw_pixels(figure, pixels, kept, image_shape)
    else:
        height = min(3.6, 10.0 / matrix_width)
        figure = new_figure(max(height * matrix_width + 1.0, 5.5), height + 1.2)
        matrix = figure.subplots()
    _draw_matrix(matrix, kept)
    remaining = int(kept.sum())
    figure.suptitle(f"{remaining:,} of {kept.size:,} connections remain ({percent(ratio(remaining, kept.size))})")
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

    figure = new_figure(7.0, 4.6)
    axes = figure.subplots()
    count = sum(value.numel() for value in values.values())
    if before is not None:
        count_before = sum(value.numel() for value in earlier.values())
        axes.stairs(
            total(earlier), edges, fill=True, color=LIGHT, label=f"before pruning ({count_before:,})", baseline=0.5
        )
    axes.stairs(total(values), edges, fill=True, color="#B9B9B9", label=f"all layers ({count:,})", baseline=0.5)
    if 1 < len(values) <= _MAX_OUTLINES:
        for colour, (name, value) in zip(LAYER_COLOURS, values.items(), strict=False):
            label = f"{short(name)} ({value.numel():,})"
            axes.stairs(histogram(value), edges, color=colour, linewidth=1.3, label=label, baseline=0.5)

    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    if count == 0 and not earlier:
        axes.set_ylim(top=10)
    axes.set_xlim(-1.02 * limit, 1.02 * limit)
    axes.set_xlabel("weight")
    axes.set_ylabel("number of weights per bin")
    axes.set_title(f"{count:,} weights remain" if count else "No weights remain")
    finish(axes)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
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
    bar.locator = integer_locator()
    bar.update_ticks()
    axes.set_xlabel("column (pixels)")
    axes.set_ylabel("row (pixels)")
    integer_ticks(axes, "both")
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
        cmap=ListedColormap(["white", BLUE]),
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
    integer_ticks(axes, "both")
    title = "Connection matrix"
    axes.set_title(title if high * wide == 1 else f"{title} (a dot: any of {high}×{wide})", fontsize="medium")


def _nonzero(weight: Tensor) -> Tensor:
    flat = weight.detach().to("cpu", torch.float32).flatten()
    return flat[(flat != 0) & flat.isfinite()]
